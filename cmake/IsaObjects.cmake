# The linker keeps one copy of an inline function for the whole library. Were that copy compiled for
# AVX-512, older processors would die in code that has nothing to do with kernels. So what the
# objects of an instruction set share with others must be inlined, or live in isa_<name>.
if(CMAKE_SCRIPT_MODE_FILE)
  foreach(object ${OBJECTS})
    execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols
                    COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" shared "${symbols}")
    list(FILTER shared EXCLUDE REGEX "isa_${ISA}|DW\\.ref\\.")
    if(shared)
      list(JOIN shared "\n  " shared)
      message(FATAL_ERROR "redknot: ${object} shares functions with other instruction sets:\n  ${shared}")
    endif()
  endforeach()
  return()
endif()

# Without optimisation nothing is inlined; such builds stay on the machine that made them.
function(redknot_check_isa_objects target isa)
  if(CMAKE_BUILD_TYPE MATCHES "^Rel" AND NOT REDKNOT_SANITIZE)
    add_custom_command(TARGET ${target} POST_BUILD VERBATIM COMMAND ${CMAKE_COMMAND}
      -DNM=${CMAKE_NM} -DISA=${isa} "-DOBJECTS=$<TARGET_OBJECTS:${target}_${isa}>"
      -P ${CMAKE_SOURCE_DIR}/cmake/IsaObjects.cmake)
  endif()
endfunction()
