#define PATH avx2_ops
#include "path.hpp"
