#define PATH avx512bf16_ops
#include "path.hpp"
