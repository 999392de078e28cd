# CUDA is a configure-time option found by its compiler, never by whether a GPU is present.
set(REDKNOT_WITH_CUDA OFF)
if(NOT REDKNOT_CUDA STREQUAL "OFF")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(REDKNOT_WITH_CUDA ON)
    # SASS of 80 serves 8.x, SASS of 90a serves Hopper, PTX of 80 serves whatever comes later.
    set(CMAKE_CUDA_ARCHITECTURES "80;90a-real" CACHE STRING "CUDA architectures")
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
      message(FATAL_ERROR "redknot: nvcc >= 12.0 is needed for sm_90a, ${CMAKE_CUDA_COMPILER} is "
                          "${CMAKE_CUDA_COMPILER_VERSION}; without CUDA: "
                          "CMAKE_ARGS=-DREDKNOT_CUDA=OFF")
    endif()
    find_package(CUDAToolkit REQUIRED)
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  elseif(REDKNOT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "redknot: REDKNOT_CUDA=ON but no nvcc was found; "
                        "put it on PATH or pass -DCMAKE_CUDA_COMPILER=")
  endif()
endif()
message(STATUS "redknot: CUDA kernels: ${REDKNOT_WITH_CUDA}")
