#define PATH generic_ops
#include "path.hpp"
