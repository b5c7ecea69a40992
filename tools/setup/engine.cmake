# Read by CMake after llama-cpp-python's project() (CMAKE_PROJECT_llama_cpp_INCLUDE): the same engine, compiled in
# less time. ggml, whose code computes, is compiled as it comes.

# Helpers of llama.cpp's programs, which are not built here. A variable wins over the cache entry that
# llama-cpp-python forces to ON.
set(LLAMA_BUILD_COMMON OFF)

# libllama reads files and builds graphs. Its own files are compiled 16 at a time, as llama.cpp has it for models: each
# alone spends most of the time on the same headers and templates. With many cores there is more to gain
# from many files.
function(zo_compile_libllama_faster)
  if(NOT TARGET llama)
    return()
  endif()
  if(NOT MSVC)
    target_compile_options(llama PRIVATE -O2)
  endif()
  cmake_host_system_information(RESULT n_cores QUERY NUMBER_OF_LOGICAL_CORES)
  if(n_cores GREATER 8)
    return()
  endif()
  get_target_property(sources llama SOURCES)
  get_target_property(folder llama SOURCE_DIR)
  list(TRANSFORM sources PREPEND "${folder}/")
  set_source_files_properties(${sources} DIRECTORY "${folder}" PROPERTIES SKIP_UNITY_BUILD_INCLUSION OFF)
endfunction()
cmake_language(DEFER CALL zo_compile_libllama_faster) # when all targets are there
