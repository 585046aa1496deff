// inner = activation(gate(x)) * value(x) for up to 16 rows of x, in one launch.
#include "functions.h"
#include "linear_tile.h"

namespace rlhf_fast::cuda {
namespace {

template <typename T, int kRows, bool kAligned>
__global__ __launch_bounds__(kTileThreads, 1) void gated_mlp_in_kernel(Weights<T> gate, Weights<T> value,
                                                                       Activation activation, Rows<T> x, T* inner,
                                                                       int64_t inner_row) {
  constexpr int kOutputs = Tile<T, false>::kOutputs;
  __shared__ TileSums<T, kRows, false> sums[2];
  const Weights<T> layers[2] = {gate, value};
  const int tile = blockIdx.x;
  sum_tile<false, kAligned>(layers, tile, x, 0, gate.in, sums);
  for (int i = threadIdx.x; i < x.count * kOutputs; i += kTileThreads) {
    const int row = i / kOutputs, output = i % kOutputs;
    const int column = tile * kOutputs + output;
    if (column >= gate.out) continue;
    // Each rounded, as the outputs of two layers are.
    const auto of = [&](int layer) {
      const T* const bias = layers[layer].bias;
      return rounded<T>(sums[layer].of(row, output) + (bias ? to_float(bias[column]) : 0.0f));
    };
    inner[row * inner_row + column] = from_float<T>(activated<T>(activation, of(0)) * of(1));
  }
}

}  // namespace

#if !defined(__CUDACC_RTC__)  // the host half

void gated_mlp_in(const Linear& gate, const Linear& value, Activation activation, const void* x, int64_t rows,
                  int64_t x_row, void* inner, int64_t inner_row, Stream stream) {
  check_rows(rows);
  with_type(gate.type, [&](auto element) {
    using T = decltype(element);
    const bool aligned = is_aligned<T>(x, x_row) && is_aligned<T>(gate.weight, gate.row_stride, gate.in) &&
                         is_aligned<T>(value.weight, value.row_stride);
    with_flag(rows > 8, [&](auto many) {
      with_flag(aligned, [&](auto aligned) {
        constexpr int kRows = decltype(many)::value ? 16 : 8;
        const dim3 grid(quotient_up(gate.out, Tile<T, false>::kOutputs));
        launch<gated_mlp_in_kernel<T, kRows, decltype(aligned)::value>>(
            grid, dim3(kTileThreads), 0, stream, weights<T>(gate), weights<T>(value), activation,
            Rows<T>{static_cast<const T*>(x), int(rows), x_row}, static_cast<T*>(inner), inner_row);
      });
    });
  });
}

#endif

}  // namespace rlhf_fast::cuda
