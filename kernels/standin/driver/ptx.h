// Just enough of PTX to tell whether a module fits the device and the kernels
// that were compiled from its source.
#pragma once
#include <string>
#include <vector>

namespace standin {

struct PtxEntry {
  std::string name;
  std::vector<unsigned> param_bytes;
};

struct Ptx {
  int major = 0, minor = 0;  // of .version
  int target = 0;            // of .target: 80 for sm_80
  std::vector<PtxEntry> entries;
};

// False: this is no PTX.
bool parse_ptx(const std::string& text, Ptx* out);
// The highest PTX version that a driver of this CUDA version takes, times ten
// (PTX ISA, release notes).
int highest_ptx(int driver_version);

}  // namespace standin
