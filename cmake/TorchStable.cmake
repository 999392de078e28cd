# Torch's stable ABI as an INTERFACE target: its include and lib folders and nothing else.
# find_package(Torch) is not used: it fails beside a partial CUDA toolkit and ties the binary to
# one torch version. REDKNOT_TORCH_DIR (the folder of the torch package) may be given.
find_package(Python3 REQUIRED COMPONENTS Interpreter Development.Module)
if(NOT REDKNOT_TORCH_DIR)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c
            "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('torch').origin).parent)"
    OUTPUT_VARIABLE REDKNOT_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE redknot_torch_missing ERROR_QUIET)
  if(redknot_torch_missing)
    message(FATAL_ERROR "redknot: ${Python3_EXECUTABLE} has no torch; "
                        "pip install -c constraints.txt torch, or pass -DREDKNOT_TORCH_DIR=")
  endif()
endif()
message(STATUS "redknot: torch at ${REDKNOT_TORCH_DIR}")

add_library(redknot_torch_stable INTERFACE)
target_include_directories(redknot_torch_stable SYSTEM INTERFACE ${REDKNOT_TORCH_DIR}/include)
target_compile_definitions(redknot_torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_directories(redknot_torch_stable INTERFACE ${REDKNOT_TORCH_DIR}/lib)
# --no-as-needed: the CUDA symbols we look up weakly live behind libtorch.so's own dependencies.
target_link_libraries(redknot_torch_stable INTERFACE
  -Wl,--push-state,--no-as-needed torch -Wl,--pop-state torch_cpu c10)
