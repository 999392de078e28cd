# Names what is missing together with the command that installs it, before CMake's own, longer
# errors do.
include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  message(FATAL_ERROR "redknot: no C++ compiler found; on Debian or Ubuntu: apt-get install g++")
endif()
enable_language(CXX)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 11)
  message(FATAL_ERROR "redknot: g++ >= 11 is needed (C++20), ${CMAKE_CXX_COMPILER} is "
                      "${CMAKE_CXX_COMPILER_VERSION}; on Debian or Ubuntu: apt-get install g++-11, "
                      "then set CXX=g++-11")
endif()

# Ours to call where a module needs Python; the interpreter may be given as Python_EXECUTABLE.
macro(redknot_require_python)
  find_package(Python 3.10 QUIET COMPONENTS Interpreter Development.Module)
  if(NOT Python_Interpreter_FOUND)
    message(FATAL_ERROR "redknot: Python >= 3.10 is needed; on Debian or Ubuntu: "
                        "apt-get install python3")
  elseif(NOT Python_Development.Module_FOUND)
    message(FATAL_ERROR "redknot: the headers of Python ${Python_VERSION} are missing; on Debian "
                        "or Ubuntu: apt-get install python3-dev")
  endif()
endmacro()
