# Read by CMake after llama-cpp-python's project() (CMAKE_PROJECT_llama_cpp_INCLUDE): the same engine, compiled
# in less time.

# Helpers of llama.cpp's programs, which are not built here. A variable wins over the cache entry that
# llama-cpp-python forces to ON.
set(LLAMA_BUILD_COMMON OFF)
