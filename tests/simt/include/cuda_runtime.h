#pragma once
#include "simt.hpp"
