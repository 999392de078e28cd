# Torch's stable ABI as an INTERFACE target: its include and lib folders and nothing else.
# find_package(Torch) is not used: it fails beside a partial CUDA toolkit and ties the binary to
# one torch version. REDKNOT_TORCH_DIR (the folder of the torch package) may be given.
set(redknot_torch_dir "${REDKNOT_TORCH_DIR}")
if(NOT redknot_torch_dir)
  # Asked on every configure and never cached: an isolated build leaves a path that is gone.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('torch').origin).parent)"
    OUTPUT_VARIABLE redknot_torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE redknot_torch_missing ERROR_QUIET)
  if(redknot_torch_missing)
    message(FATAL_ERROR "redknot: ${Python_EXECUTABLE} has no torch; "
                        "pip install -c constraints.txt torch, or pass -DREDKNOT_TORCH_DIR=")
  endif()
endif()
message(STATUS "redknot: torch at ${redknot_torch_dir}")

add_library(redknot_torch_stable INTERFACE)
target_include_directories(redknot_torch_stable SYSTEM INTERFACE ${redknot_torch_dir}/include)
# 2.11: the oldest torch that the binary loads under, whichever it was built against.
target_compile_definitions(redknot_torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_directories(redknot_torch_stable INTERFACE ${redknot_torch_dir}/lib)
# --no-as-needed: the CUDA symbols we look up weakly live behind libtorch.so's own dependencies.
target_link_libraries(redknot_torch_stable INTERFACE
  -Wl,--push-state,--no-as-needed torch -Wl,--pop-state torch_cpu c10)
