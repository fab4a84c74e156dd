// One launch from a file, in a process that a sanitizer watches: run_case KERNEL FILE. Buffers are allocations of their
// exact sizes; afterwards the file holds what they became. The file: int64 grid[3], group[3], order, count,
// sizes[count], then the buffers' bytes.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "simt.h"

int main(int argc, char** argv) {
  FILE* file = argc == 3 ? fopen(argv[2], "r+b") : nullptr;
  if (!file) return fprintf(stderr, "run_case KERNEL FILE\n"), 2;
  int64_t head[8];
  if (fread(head, 8, 8, file) != 8) return 2;
  unsigned grid[3], group[3];
  for (int d = 0; d < 3; d++) grid[d] = head[d], group[d] = head[3 + d];
  std::vector<int64_t> sizes(head[7]);
  if (fread(sizes.data(), 8, sizes.size(), file) != sizes.size()) return 2;
  std::vector<void*> buffers;
  for (int64_t size : sizes) {
    buffers.push_back(malloc(size));
    if (fread(buffers.back(), 1, size, file) != (size_t)size) return 2;
  }
  const simt_kernel kernel = (simt_kernel)dlsym(RTLD_DEFAULT, argv[1]);
  if (!kernel) return fprintf(stderr, "no kernel %s\n", argv[1]), 2;
  if (simt_launch(kernel, buffers.data(), grid, group, head[6])) return fprintf(stderr, "%s\n", simt_error()), 1;
  fseek(file, 8 * (8 + sizes.size()), SEEK_SET);
  for (size_t i = 0; i < buffers.size(); i++) {
    fwrite(buffers[i], 1, sizes[i], file);
    free(buffers[i]);
  }
  return fclose(file);
}
