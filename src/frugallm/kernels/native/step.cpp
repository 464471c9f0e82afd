#include "step.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace frugal {

namespace {

constexpr int ALONE = 8;  // rows that every thread rounds for itself, which is cheaper than to wait for another

int64_t rounded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

class Buffer {  // aligned, zeroed when it grows
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }
    template <class T>
    T* get(int64_t count) {
        int64_t bytes = rounded(count * int64_t(sizeof(T)), 64) + 64;
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(64, size_t(bytes));
            if (data_ == nullptr) throw std::bad_alloc();
            std::memset(data_, 0, size_t(bytes));
            size_ = bytes;
        }
        return static_cast<T*>(data_);
    }

private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

// Room for rows in the form that any of the model's weights reads.
struct InputBuffers {
    Buffer words, scales, sums;
    void reserve(int64_t rows, int64_t stride, int64_t groups) {
        words.get<uint32_t>(rows * stride), scales.get<float>(rows * groups), sums.get<int32_t>(rows * groups);
    }
    Inputs get(const Linear& w, int64_t rows) {
        return {words.get<uint32_t>(0), scales.get<float>(0), sums.get<int32_t>(0), words_of(w), w.groups, rows};
    }
};

Fault check(const Model& m, const Batch& b) {
    if (b.starts[0] != 0 || b.starts[b.sequences] != b.count) return BAD_STARTS;
    for (int s = 0; s < b.sequences; s++) {
        const int32_t* table = b.tables + int64_t(s) * b.table_width;
        if (b.starts[s] > b.starts[s + 1]) return BAD_STARTS;
        for (int t = b.starts[s]; t < b.starts[s + 1]; t++) {
            if (b.tokens[t] < 0 || b.tokens[t] >= m.vocabulary) return BAD_TOKEN;
            bool follows = t == b.starts[s] || b.positions[t] == b.positions[t - 1] + 1;
            if (b.positions[t] < 0 || b.positions[t] >= m.positions || !follows) return BAD_POSITION;
        }
        int blocks = b.starts[s + 1] > b.starts[s] ? b.positions[b.starts[s + 1] - 1] / BLOCK + 1 : 0;
        if (blocks > b.table_width) return BAD_BLOCK;
        for (int i = 0; i < blocks; i++)
            if (table[i] < 0 || table[i] >= m.blocks) return BAD_BLOCK;
    }
    for (int r = 0; r < b.rows; r++)
        if (b.wanted[r] < 0 || b.wanted[r] >= b.count) return BAD_ROW;
    return FINE;
}

struct Item {  // queries of one sequence that attend together; row of what they give: that of the first
    int32_t sequence, first, last, row;
};

struct Items {
    std::vector<Item> all;
    int chunks = 1;  // of the longest text, if threads share them; else 1
};

// The residual stream of some tokens: one that threads share, or, where every thread norms for itself, a copy for each.
struct Stream {
    int64_t rows = 0;
    bool each = false;
    Buffer shared;
    std::vector<Buffer> copies;
    explicit Stream(int threads) : copies(threads) {}
    void reserve(int64_t count, int64_t width, bool apart) {
        rows = count, each = apart && count <= ALONE;
        shared.get<float>(count * width);
        for (auto& copy : copies) copy.get<float>(each ? count * width : 0);
    }
    float* of(int thread) { return (each ? copies[size_t(thread)] : shared).get<float>(0); }
};

}  // namespace

struct Stepper::Work {
    const Ops& ops;
    Pool& pool;
    const Model& m;
    Batch batch{};
    int64_t hidden, attended, inner, projected;  // strides
    int64_t words, groups;                       // the most of any weight
    int padded;
    bool apart;  // whether what a sublayer gives is normed before it is added
    Buffer qkv_, attended_, given_, inner_, pairs_, partials_;
    float *qkv, *mixed, *given, *gated;
    uint16_t* pairs;
    std::vector<InputBuffers> inputs;  // the first is everybody's, the others one thread's
    std::vector<Buffer> own;           // one thread's normed row
    Stream stream, wanted;  // of all tokens; of those whose logits are wanted, as nobody asks for others behind the last cache
    Items items, wanted_items;
    Partial* partials;

    Work(const Ops& o, Pool& p, const Model& model)
        : ops(o), pool(p), m(model), inputs(p.size() + 1), own(p.size()), stream(p.size()), wanted(p.size()) {
        apart = m.count > 0 && m.layers[0].output_norm != nullptr;
        hidden = room(m.hidden), attended = room(m.heads * m.head_dim), inner = room(m.inner);
        projected = rounded((m.heads + 2 * m.key_heads) * m.head_dim, 16) + 16;
        padded = int(rounded(m.head_dim, 16));
        words = words_of(m.head), groups = m.head.groups;
        for (int i = 0; i < m.count; i++)
            for (const Linear* w : {&m.layers[i].qkv, &m.layers[i].output, &m.layers[i].gate_up, &m.layers[i].down})
                words = std::max(words, words_of(*w)), groups = std::max<int64_t>(groups, w->groups);
    }

    // Rows end in zeros up to whole tiles and groups of whatever reads them.
    static int64_t room(int64_t width) { return rounded(width, 16) + 256; }

    void begin(const Batch& b);
    void all(int thread);
    void layer(int index, int thread);
    void times(const Linear& w, float* x, int64_t x_stride, int64_t rows, float* out, int64_t out_stride, int epilogue,
               int thread, const float* norm = nullptr, const float* waiting = nullptr);
    void add(const float* gain, int64_t row, float* x, float* room);
    void add_items(Items& to, int sequence, int first, int last, int row);
    void share_chunks(Items& of, int longest);
    void take_wanted(int thread);
    void place(const Layer& layer, const Cache& cache, int thread);
    int queries_of(const Item& item, int key_head, int first, Query* queries) const;
    const int32_t* table_of(const Item& item) const { return batch.tables + int64_t(item.sequence) * batch.table_width; }
    void attend(const Cache& cache, const Items& items, int thread);
    void attend_by_chunks(const Cache& cache, const Items& items, int thread);
    Cache cache_of(int layer) const;
    Cache head_of(Cache cache, int head) const {
        cache.keys += int64_t(head) * padded * BLOCK, cache.values += int64_t(head) * padded * BLOCK;
        return cache;
    }
};

void Stepper::Work::begin(const Batch& b) {
    batch = b;
    stream.reserve(b.count, hidden, apart), wanted.reserve(b.rows, hidden, apart);
    int64_t most = std::max(b.count, b.rows);
    qkv = qkv_.get<float>(b.count * projected);
    mixed = attended_.get<float>(most * attended), gated = inner_.get<float>(most * inner);
    pairs = pairs_.get<uint16_t>(int64_t(b.count) * m.heads * padded);
    given = given_.get<float>(apart ? most * hidden : 0);
    for (auto& buffer : own) buffer.get<float>(hidden);
    for (auto& buffers : inputs) buffers.reserve(&buffers == &inputs[0] ? std::max<int64_t>(ALONE, most) : ALONE, words, groups);
    items.all.clear(), wanted_items.all.clear();
    for (int s = 0; s < b.sequences; s++) add_items(items, s, b.starts[s], b.starts[s + 1], b.starts[s]);
    int longest = 0;
    for (int r = 0; r < b.rows; r++) {
        int t = b.wanted[r], sequence = int(std::upper_bound(b.starts, b.starts + b.sequences, t) - b.starts) - 1;
        add_items(wanted_items, sequence, t, t + 1, r);
        longest = std::max(longest, b.positions[t]);
    }
    share_chunks(items, *std::max_element(b.positions, b.positions + b.count));
    share_chunks(wanted_items, longest);
    auto room_of = [&](const Items& of) { return of.chunks > 1 ? int64_t(of.all.size()) * m.key_heads * of.chunks * QUERIES : 0; };
    partials = partials_.get<Partial>(std::max(room_of(items), room_of(wanted_items)));
}

// Tokens from first to last of a sequence, as many at once as attend together.
void Stepper::Work::add_items(Items& to, int sequence, int first, int last, int row) {
    int tokens = std::max(1, QUERIES / (m.heads / m.key_heads));
    for (int t = first; t < last; t += tokens) to.all.push_back({sequence, t, std::min(t + tokens, last), row + t - first});
}

// Where there are few heads for many threads.
void Stepper::Work::share_chunks(Items& of, int longest) {
    bool few = int64_t(of.all.size()) * m.key_heads < 4 * pool.size();
    of.chunks = few && pool.size() > 1 && m.heads / m.key_heads <= QUERIES ? longest / CHUNK + 1 : 1;
}

Cache Stepper::Work::cache_of(int layer) const {
    int64_t block = int64_t(m.key_heads) * padded * BLOCK, before = int64_t(layer) * m.blocks * block;
    return {m.keys + before, m.values + before, block, m.head_dim, padded, m.layers[layer].window, m.scale};
}

// Norm a row of what a sublayer gave and add it to the stream. No row of it is whole before a barrier, and the next to need the
// stream is a norm of the same rows: whoever computes that adds first. Threads that norm every row for themselves have copies.
void Stepper::Work::add(const float* gain, int64_t row, float* x, float* room) {
    ops.rms_norm(given + row * hidden, gain, m.eps, m.hidden, room);
    for (int i = 0; i < m.hidden; i++) x[i] = x[i] + room[i];
}

// Product of rows, normed first if there is a norm, behind what waits to be added. Ends without a barrier.
void Stepper::Work::times(const Linear& w, float* x, int64_t x_stride, int64_t rows, float* out, int64_t out_stride,
                          int epilogue, int thread, const float* norm, const float* waiting) {
    bool alone = rows <= ALONE;
    Inputs in = inputs[alone ? thread + 1 : 0].get(w, rows);
    Range mine = alone ? Range{0, rows} : share(rows, thread, pool.size());
    if (norm == nullptr) {
        ops.prepare(w, x, x_stride, mine.first, mine.last, in);
    } else {
        float* normed = own[size_t(thread)].get<float>(0);
        for (int64_t row = mine.first; row < mine.last; row++) {
            if (waiting != nullptr) add(waiting, row, x + row * x_stride, normed);
            ops.rms_norm(x + row * x_stride, norm, m.eps, m.hidden, normed);
            ops.prepare(w, normed, 0, row, row + 1, in);
        }
    }
    if (!alone) pool.barrier();
    Range tiles = share(w.tiles, thread, pool.size(), is_gated(epilogue) ? 2 : 1);
    if (tiles.first < tiles.last)
        ops.linear(w, in, 0, rows, int(tiles.first), int(tiles.last), out, out_stride, epilogue);
}

// Norms and rotation of queries and keys; queries become bf16, keys and values go to the cache.
void Stepper::Work::place(const Layer& layer, const Cache& cache, int thread) {
    int half = m.head_dim / 2, all_heads = m.heads + m.key_heads;
    for (int s = 0; s < batch.sequences; s++) {
        const int32_t* table = batch.tables + int64_t(s) * batch.table_width;
        int64_t count = batch.starts[s + 1] - batch.starts[s];
        Range mine = share(count * all_heads, thread, pool.size());
        for (int64_t i = mine.first; i < mine.last; i++) {
            int64_t t = batch.starts[s] + i / all_heads;
            int head = int(i % all_heads), position = batch.positions[t];
            float* x = qkv + t * projected + int64_t(head) * m.head_dim;
            const float* norm = head < m.heads ? layer.query_norm : layer.key_norm;
            if (norm != nullptr) ops.rms_norm(x, norm, m.eps, m.head_dim, x);
            ops.rotate(x, layer.cos + int64_t(position) * half, layer.sin + int64_t(position) * half, half);
            if (head < m.heads) {
                ops.to_bf16(x, m.head_dim, padded, pairs + (t * m.heads + head) * padded);
                continue;
            }
            const float* value = x + int64_t(m.key_heads) * m.head_dim;
            ops.write_cache(head_of(cache, head - m.heads), table[position / BLOCK], position % BLOCK, x, value);
        }
    }
}

// The queries of an item that share a head of keys, from the first of them on; returns how many there are.
int Stepper::Work::queries_of(const Item& item, int key_head, int first, Query* queries) const {
    int group = m.heads / m.key_heads, all = (item.last - item.first) * group, count = 0;
    for (int i = first; i < all && count < QUERIES; i++) {
        int64_t t = item.first + i / group, head = key_head * group + i % group;
        float* out = mixed + (item.row + i / group) * attended + head * m.head_dim;
        queries[count++] = {(const uint32_t*)(pairs + (t * m.heads + head) * padded), out, batch.positions[t]};
    }
    return count;
}

void Stepper::Work::attend(const Cache& cache, const Items& items, int thread) {
    if (items.chunks > 1) return attend_by_chunks(cache, items, thread);
    Query queries[QUERIES];
    // Strided, as later items of a sequence see more.
    for (int64_t i = thread; i < int64_t(items.all.size()) * m.key_heads; i += pool.size()) {
        const Item& item = items.all[size_t(i / m.key_heads)];
        int key_head = int(i % m.key_heads), count = 0;
        for (int first = 0; (count = queries_of(item, key_head, first, queries)) > 0; first += count)
            ops.attend(head_of(cache, key_head), table_of(item), queries, count);
    }
}

// The same where there are few heads for many threads and long texts: threads share the chunks.
void Stepper::Work::attend_by_chunks(const Cache& cache, const Items& items, int thread) {
    const int chunks = items.chunks;
    int64_t pairs_of = int64_t(items.all.size()) * m.key_heads;
    Query queries[QUERIES];
    for (int64_t i = thread; i < pairs_of * chunks; i += pool.size()) {
        int64_t unit = i / chunks, begin = i % chunks * CHUNK;
        const Item& item = items.all[size_t(unit / m.key_heads)];
        int key_head = int(unit % m.key_heads), count = queries_of(item, key_head, 0, queries);
        if (cache.window > 0 && begin + CHUNK <= queries[0].position + 1 - cache.window) {
            for (int n = 0; n < count; n++) partials[i * QUERIES + n].largest = -__builtin_inff();  // out of everybody's sight
            continue;
        }
        ops.attend_chunk(head_of(cache, key_head), table_of(item), queries, count, int(begin), partials + i * QUERIES);
    }
    pool.barrier();
    for (int64_t unit = thread; unit < pairs_of; unit += pool.size()) {
        int count = queries_of(items.all[size_t(unit / m.key_heads)], int(unit % m.key_heads), 0, queries);
        ops.join(cache, queries, count, partials + unit * chunks * QUERIES, chunks);
    }
}

void Stepper::Work::layer(int index, int thread) {
    const Layer& l = m.layers[index];
    const bool last = index == m.count - 1;
    Cache cache = cache_of(index);
    times(l.qkv, stream.of(thread), hidden, stream.rows, qkv, projected, STORE, thread, l.norm,
          index > 0 ? (&l)[-1].down_norm : nullptr);
    pool.barrier();
    place(l, cache, thread);
    pool.barrier();
    Stream& rest = last ? wanted : stream;
    if (rest.rows == 0) return;
    attend(cache, last ? wanted_items : items, thread);
    if (last) take_wanted(thread);
    pool.barrier();
    float *x = rest.of(thread), *to = apart ? given : x;
    const int how = apart ? STORE : ADD;
    times(l.output, mixed, attended, rest.rows, to, hidden, how, thread);
    pool.barrier();
    times(l.gate_up, x, hidden, rest.rows, gated, inner, m.activation, thread, l.second_norm, l.output_norm);
    pool.barrier();
    times(l.down, gated, inner, rest.rows, to, hidden, how, thread);
    pool.barrier();
}

void Stepper::Work::take_wanted(int thread) {
    Range mine = wanted.each ? Range{0, wanted.rows} : share(wanted.rows, thread, pool.size());
    const float* from = stream.of(thread);
    float* to = wanted.of(thread);
    for (int64_t r = mine.first; r < mine.last; r++)
        std::memcpy(to + r * hidden, from + int64_t(batch.wanted[r]) * hidden, sizeof(float) * m.hidden);
}

void Stepper::Work::all(int thread) {
    Range mine = stream.each ? Range{0, stream.rows} : share(stream.rows, thread, pool.size());
    for (int64_t t = mine.first; t < mine.last; t++) {
        float* row = stream.of(thread) + t * hidden;
        ops.embed(m.embedding, batch.tokens[t], row);
        if (m.embed_scale != 1.0f)
            for (int i = 0; i < m.hidden; i++) row[i] = row[i] * m.embed_scale;
    }
    pool.barrier();
    for (int index = 0; index < m.count; index++) layer(index, thread);
    if (wanted.rows == 0) return;
    times(m.head, wanted.of(thread), hidden, wanted.rows, batch.logits, int64_t(m.head.tiles) * TILE, STORE, thread, m.last_norm,
          apart ? m.layers[m.count - 1].down_norm : nullptr);
}

Stepper::Stepper(const Ops& ops, Pool& pool, const Model& model) : work_(new Work(ops, pool, model)), pool_(pool) {}
Stepper::~Stepper() { delete work_; }

Fault Stepper::run(const Batch& batch) {
    Fault fault = check(work_->m, batch);
    if (fault != FINE || batch.count == 0) return fault;
    try {
        work_->begin(batch);
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
    pool_.run([](void* work, Pool&, int thread) { static_cast<Work*>(work)->all(thread); }, work_);
    return FINE;
}

}  // namespace frugal
