# Warnings for our own targets alone; third-party headers come in as SYSTEM. They are errors only
# where the project is worked on: what a compiler yet to come warns of must not stop a user's build.
option(REDKNOT_WERROR "Treat warnings as errors" OFF)
function(redknot_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wno-psabi>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
  if(REDKNOT_WERROR)
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-Werror> $<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings>)
  endif()
endfunction()
