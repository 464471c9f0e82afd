#define PATH avx512_ops
#include "path.hpp"
