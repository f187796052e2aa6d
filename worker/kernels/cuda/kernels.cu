// Fused operators of the frozen networks, forward and backward to their inputs, and the rounding of rows to eight bits.
//
// Compiled at run time behind device.h, once for each kind of number: KIND is 0 (f32), 1 (f16) or 2 (bf16). Everything is computed in f32. Maps lie in memory
// with the channels last, so that a "row" is a pixel (or a token) with all its channels. Numbers are read and written in packs of 16 bytes,
// which is why widths must be multiples of WIDTH and every address one of 16.

// Threads of a group norm's block, of which each has WIDTH channels: the widest map of a published UNet has 2560. As in src/group_norm.rs.
#if KIND == 0
typedef float element;
#define WIDTH 4
#define NORM_BOUNDS __launch_bounds__(640, 1)
#else
typedef unsigned short element;
#define WIDTH 8
#define NORM_BOUNDS __launch_bounds__(384, 2)
#endif

#define WARP 32
#define EVERY_LANE 0xffffffffu

struct __align__(16) Pack {
  element at[WIDTH];
};

__device__ static inline float from_element(element value) {
#if KIND == 0
  return value;
#elif KIND == 1
  return half_to_float(value);
#else
  return bfloat_to_float(value);
#endif
}

__device__ static inline element to_element(float value) {
#if KIND == 0
  return value;
#elif KIND == 1
  return float_to_half(value);
#else
  return float_to_bfloat(value);
#endif
}

__device__ static inline Pack load(const element* from) { return *reinterpret_cast<const Pack*>(from); }

__device__ static inline void store(element* to, const Pack& pack) { *reinterpret_cast<Pack*>(to) = pack; }

// The part of a block that walks over some rows of one sample: each thread has WIDTH channels of every `lanes`-th row.
struct Walk {
  int columns, lanes, lane, channel, first, end;

  __device__ Walk(int rows, int channels, int rows_per_block) {
    columns = channels / WIDTH;
    lanes = blockDim.x / columns;
    lane = threadIdx.x / columns;
    channel = (threadIdx.x % columns) * WIDTH;
    first = blockIdx.x * rows_per_block + lane;
    end = (blockIdx.x + 1) * rows_per_block < rows ? (blockIdx.x + 1) * rows_per_block : rows;
  }
};

// Adds two sums of each channel up over the block's lanes and each group's channels: `partials` [N, chunks, groups, 2].
// `scratch` holds 2 * WIDTH floats a thread.
__device__ static void reduce_groups(const float* one, const float* two, const Walk& walk, int channels, int groups, float* scratch,
                                     float* partials) {
  for (int k = 0; k < WIDTH; ++k) {
    scratch[2 * (walk.lane * channels + walk.channel + k)] = one[k];
    scratch[2 * (walk.lane * channels + walk.channel + k) + 1] = two[k];
  }
  __syncthreads();
  for (int index = threadIdx.x; index < 2 * channels; index += blockDim.x) {
    float sum = scratch[index];
    for (int lane = 1; lane < walk.lanes; ++lane) sum += scratch[2 * lane * channels + index];
    scratch[index] = sum;
  }
  __syncthreads();
  int size = channels / groups;
  for (int index = threadIdx.x; index < 2 * groups; index += blockDim.x) {
    int group = index / 2;
    float sum = 0.0f;
    for (int channel = group * size; channel < (group + 1) * size; ++channel) sum += scratch[2 * channel + index % 2];
    partials[((size_t)blockIdx.y * gridDim.x + blockIdx.x) * 2 * groups + index] = sum;
  }
}

// The sums of all blocks of this block's sample, [groups, 2], into `sums`. `scratch` holds blockDim.x floats, and 2 * groups <= blockDim.x.
__device__ static void gather_groups(const float* partials, int groups, float* scratch, float* sums) {
  int values = 2 * groups, parts = blockDim.x / values;
  int value = threadIdx.x % values, part = threadIdx.x / values;
  if (part < parts) {
    float sum = 0.0f;
    for (int chunk = part; chunk < gridDim.x; chunk += parts) sum += partials[((size_t)blockIdx.y * gridDim.x + chunk) * values + value];
    scratch[part * values + value] = sum;
  }
  __syncthreads();
  for (int index = threadIdx.x; index < values; index += blockDim.x) {
    float sum = scratch[index];
    for (int other = 1; other < parts; ++other) sum += scratch[other * values + index];
    sums[index] = sum;
  }
  __syncthreads();
}

// What is subtracted before squares are summed, so that a large mean costs no digits: the group's first number in the sample.
__device__ static inline float pivot(const element* sample, const element* added, int group, int size) {
  float first = from_element(sample[group * size]);
  return added ? first + from_element(added[group * size]) : first;
}

// Sums of x - pivot and of its square in each group. x [N, rows, channels]; added, if any, [N, channels] is part of x.
extern "C" __global__ void NORM_BOUNDS group_norm_sums(const element* x, const element* added, float* partials, int rows, int channels,
                                                       int groups, int rows_per_block) {
  SHARED_FLOATS(scratch);
  Walk walk(rows, channels, rows_per_block);
  const element* sample = x + (size_t)blockIdx.y * rows * channels;
  if (added) added += (size_t)blockIdx.y * channels;
  int size = channels / groups;
  float less[WIDTH], sum[WIDTH], squares[WIDTH];
  for (int k = 0; k < WIDTH; ++k) {
    float more = added ? from_element(added[walk.channel + k]) : 0.0f;
    less[k] = pivot(sample, added, (walk.channel + k) / size, size) - more;
    sum[k] = squares[k] = 0.0f;
  }
  for (int row = walk.first; row < walk.end; row += walk.lanes) {
    Pack pack = load(sample + (size_t)row * channels + walk.channel);
    for (int k = 0; k < WIDTH; ++k) {
      float value = from_element(pack.at[k]) - less[k];
      sum[k] += value;
      squares[k] += value * value;
    }
  }
  reduce_groups(sum, squares, walk, channels, groups, scratch, partials);
}

// What a channel is normalised with: mean and scale of its group; what is added to the channel is taken off the mean.
__device__ static inline void normalisation(const float* stats, const element* added, int channel, int size, float* mean, float* scale) {
  int group = channel / size;
  *mean = stats[2 * group] - (added ? from_element(added[channel]) : 0.0f);
  *scale = stats[2 * group + 1];
}

// y = (x + added - mean) / std * weight + bias, and SiLU of it if asked. Writes mean and 1 / std of each group to `stats` [N, groups, 2].
extern "C" __global__ void NORM_BOUNDS
    group_norm_apply(const element* x, const element* added, const element* weight, const element* bias, const float* partials, element* y,
                     float* stats, int rows, int channels, int groups, int rows_per_block, float eps, int silu) {
  SHARED_FLOATS(scratch);
  float* sums = scratch + blockDim.x;
  Walk walk(rows, channels, rows_per_block);
  const element* sample = x + (size_t)blockIdx.y * rows * channels;
  element* out = y + (size_t)blockIdx.y * rows * channels;
  if (added) added += (size_t)blockIdx.y * channels;
  gather_groups(partials, groups, scratch, sums);
  int size = channels / groups;
  float count = (float)rows * size;
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    float offset = sums[2 * group] / count;
    float variance = sums[2 * group + 1] / count - offset * offset;
    float mean = pivot(sample, added, group, size) + offset;
    // What is not finite shows in the mean, whatever becomes of the variance.
    float scale = rsqrtf((variance > 0.0f ? variance : 0.0f) + eps);
    sums[2 * group] = mean;
    sums[2 * group + 1] = scale;
    if (blockIdx.x == 0) {
      stats[((size_t)blockIdx.y * groups + group) * 2] = mean;
      stats[((size_t)blockIdx.y * groups + group) * 2 + 1] = scale;
    }
  }
  __syncthreads();
  float mean[WIDTH], factor[WIDTH], shift[WIDTH];
  for (int k = 0; k < WIDTH; ++k) {
    normalisation(sums, added, walk.channel + k, size, &mean[k], &factor[k]);
    factor[k] *= from_element(weight[walk.channel + k]);
    shift[k] = from_element(bias[walk.channel + k]);
  }
  for (int row = walk.first; row < walk.end; row += walk.lanes) {
    size_t place = (size_t)row * channels + walk.channel;
    Pack pack = load(sample + place);
    for (int k = 0; k < WIDTH; ++k) {
      float value = (from_element(pack.at[k]) - mean[k]) * factor[k] + shift[k];
      if (silu) value = value / (1.0f + expf(-value));
      pack.at[k] = to_element(value);
    }
    store(out + place, pack);
  }
}

// What the gradient of one number is computed from.
struct Point {
  float normal, gradient;

  // `normal` is x normalised without weight and bias; `gradient` is that of it. `dy` is the gradient behind the SiLU, if there is one.
  __device__ Point(float x, float dy, float mean, float scale, float weight, float bias, int silu) {
    normal = (x - mean) * scale;
    if (silu) {
      float value = normal * weight + bias;
      float open = 1.0f / (1.0f + expf(-value));
      dy *= open * (1.0f + value * (1.0f - open));
    }
    gradient = dy * weight;
  }
};

// Sums of the gradient of normalised x, and of its product with normalised x, in each group.
extern "C" __global__ void NORM_BOUNDS
    group_norm_gradient_sums(const element* x, const element* added, const element* dy, const element* weight, const element* bias,
                             const float* stats, float* partials, int rows, int channels, int groups, int rows_per_block, int silu) {
  SHARED_FLOATS(scratch);
  Walk walk(rows, channels, rows_per_block);
  size_t sample = (size_t)blockIdx.y * rows * channels;
  if (added) added += (size_t)blockIdx.y * channels;
  stats += (size_t)blockIdx.y * groups * 2;
  int size = channels / groups;
  // Weights stay packed: registers are what bounds the threads at work.
  Pack weights = load(weight + walk.channel), biases = load(bias + walk.channel);
  float mean[WIDTH], scale[WIDTH], sum[WIDTH], products[WIDTH];
  for (int k = 0; k < WIDTH; ++k) {
    normalisation(stats, added, walk.channel + k, size, &mean[k], &scale[k]);
    sum[k] = products[k] = 0.0f;
  }
  for (int row = walk.first; row < walk.end; row += walk.lanes) {
    size_t place = sample + (size_t)row * channels + walk.channel;
    Pack values = load(x + place), gradients = load(dy + place);
    for (int k = 0; k < WIDTH; ++k) {
      Point point(from_element(values.at[k]), from_element(gradients.at[k]), mean[k], scale[k], from_element(weights.at[k]),
                  from_element(biases.at[k]), silu);
      sum[k] += point.gradient;
      products[k] += point.gradient * point.normal;
    }
  }
  reduce_groups(sum, products, walk, channels, groups, scratch, partials);
}

// The gradient of x; with `added_partials` [N, chunks, channels] also its sum over this block's rows, whose sum over the blocks is the
// gradient of what was added.
extern "C" __global__ void NORM_BOUNDS
    group_norm_gradient_apply(const element* x, const element* added, const element* dy, const element* weight, const element* bias,
                              const float* stats, const float* partials, element* dx, float* added_partials, int rows, int channels,
                              int groups, int rows_per_block, int silu) {
  SHARED_FLOATS(scratch);
  float* sums = scratch + blockDim.x;
  Walk walk(rows, channels, rows_per_block);
  size_t sample = (size_t)blockIdx.y * rows * channels;
  if (added) added += (size_t)blockIdx.y * channels;
  stats += (size_t)blockIdx.y * groups * 2;
  gather_groups(partials, groups, scratch, sums);
  int size = channels / groups;
  float count = (float)rows * size;
  Pack weights = load(weight + walk.channel), biases = load(bias + walk.channel);
  float mean[WIDTH], scale[WIDTH], one[WIDTH], two[WIDTH], total[WIDTH];
  for (int k = 0; k < WIDTH; ++k) {
    int group = (walk.channel + k) / size;
    normalisation(stats, added, walk.channel + k, size, &mean[k], &scale[k]);
    one[k] = sums[2 * group] / count;
    two[k] = sums[2 * group + 1] / count;
    total[k] = 0.0f;
  }
  for (int row = walk.first; row < walk.end; row += walk.lanes) {
    size_t place = sample + (size_t)row * channels + walk.channel;
    Pack values = load(x + place), gradients = load(dy + place);
    for (int k = 0; k < WIDTH; ++k) {
      Point point(from_element(values.at[k]), from_element(gradients.at[k]), mean[k], scale[k], from_element(weights.at[k]),
                  from_element(biases.at[k]), silu);
      float gradient = scale[k] * (point.gradient - one[k] - point.normal * two[k]);
      total[k] += gradient;
      values.at[k] = to_element(gradient);
    }
    store(dx + place, values);
  }
  if (!added_partials) return;
  // The sums of the groups have been read by all.
  __syncthreads();
  for (int k = 0; k < WIDTH; ++k) scratch[walk.lane * channels + walk.channel + k] = total[k];
  __syncthreads();
  for (int channel = threadIdx.x; channel < channels; channel += blockDim.x) {
    float sum = scratch[channel];
    for (int lane = 1; lane < walk.lanes; ++lane) sum += scratch[lane * channels + channel];
    added_partials[((size_t)blockIdx.y * gridDim.x + blockIdx.x) * channels + channel] = sum;
  }
}

// y = x + residual + bias, where bias [channels] is added to each row of both [rows, channels].
extern "C" __global__ void __launch_bounds__(256)
    add_residual(const element* x, const element* residual, const element* bias, element* y, int rows, int channels) {
  int columns = channels / WIDTH;
  for (size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x; index < (size_t)rows * columns; index += (size_t)gridDim.x * blockDim.x) {
    Pack left = load(x + index * WIDTH), right = load(residual + index * WIDTH), more = load(bias + index % columns * WIDTH);
    for (int k = 0; k < WIDTH; ++k) left.at[k] = to_element(from_element(left.at[k]) + from_element(right.at[k]) + from_element(more.at[k]));
    store(y + index * WIDTH, left);
  }
}

#define SQRT_HALF 0.70710678118654752f
#define SQRT_HALF_OVER_PI 0.39894228040143268f

// y = value * gelu(gate), exact. h [rows, 2 * inner]: values, then gates.
extern "C" __global__ void __launch_bounds__(256) geglu_forward(const element* h, element* y, int rows, int inner) {
  int columns = inner / WIDTH;
  for (size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x; index < (size_t)rows * columns; index += (size_t)gridDim.x * blockDim.x) {
    size_t row = index / columns, place = (index % columns) * WIDTH;
    Pack values = load(h + row * 2 * inner + place), gates = load(h + row * 2 * inner + inner + place);
    for (int k = 0; k < WIDTH; ++k) {
      float gate = from_element(gates.at[k]);
      // Rounded between the two, as it is where they are computed one after the other.
      float open = from_element(to_element(0.5f * gate * (1.0f + erff(gate * SQRT_HALF))));
      values.at[k] = to_element(from_element(values.at[k]) * open);
    }
    store(y + row * inner + place, values);
  }
}

// The gradient of h from that of y.
extern "C" __global__ void __launch_bounds__(256) geglu_backward(const element* h, const element* dy, element* dh, int rows, int inner) {
  int columns = inner / WIDTH;
  for (size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x; index < (size_t)rows * columns; index += (size_t)gridDim.x * blockDim.x) {
    size_t row = index / columns, place = (index % columns) * WIDTH;
    Pack values = load(h + row * 2 * inner + place), gates = load(h + row * 2 * inner + inner + place), gradients = load(dy + row * inner + place);
    for (int k = 0; k < WIDTH; ++k) {
      float gate = from_element(gates.at[k]), gradient = from_element(gradients.at[k]);
      float below = 0.5f * (1.0f + erff(gate * SQRT_HALF));
      float slope = below + gate * SQRT_HALF_OVER_PI * expf(-0.5f * gate * gate);
      gates.at[k] = to_element(gradient * from_element(values.at[k]) * slope);
      values.at[k] = to_element(gradient * gate * below);
    }
    store(dh + row * 2 * inner + place, values);
    store(dh + row * 2 * inner + inner + place, gates);
  }
}

__device__ static inline float sum_of_warp(float value) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(EVERY_LANE, value, distance);
  return value;
}

// sum = x + residual, and y = layer norm of it. A warp takes a row; stats [rows, 2] become mean and 1 / std.
extern "C" __global__ void __launch_bounds__(128)
    add_layer_norm_forward(const element* x, const element* residual, const element* weight, const element* bias, element* sum, element* y,
                           float* stats, int rows, int width, float eps) {
  int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
  if (row >= rows) return;
  x += (size_t)row * width;
  residual += (size_t)row * width;
  sum += (size_t)row * width;
  y += (size_t)row * width;
  float total = 0.0f;
  for (int place = lane * WIDTH; place < width; place += WARP * WIDTH) {
    Pack left = load(x + place), right = load(residual + place);
    for (int k = 0; k < WIDTH; ++k) {
      left.at[k] = to_element(from_element(left.at[k]) + from_element(right.at[k]));
      total += from_element(left.at[k]);
    }
    store(sum + place, left);
  }
  float mean = sum_of_warp(total) / width;
  // Every thread reads what it has written itself, from the nearest cache.
  float squares = 0.0f;
  for (int place = lane * WIDTH; place < width; place += WARP * WIDTH) {
    Pack pack = load(sum + place);
    for (int k = 0; k < WIDTH; ++k) {
      float offset = from_element(pack.at[k]) - mean;
      squares += offset * offset;
    }
  }
  float scale = rsqrtf(sum_of_warp(squares) / width + eps);
  for (int place = lane * WIDTH; place < width; place += WARP * WIDTH) {
    Pack pack = load(sum + place), weights = load(weight + place), biases = load(bias + place);
    for (int k = 0; k < WIDTH; ++k) {
      float value = (from_element(pack.at[k]) - mean) * scale;
      pack.at[k] = to_element(value * from_element(weights.at[k]) + from_element(biases.at[k]));
    }
    store(y + place, pack);
  }
  if (lane == 0) {
    stats[2 * (size_t)row] = mean;
    stats[2 * (size_t)row + 1] = scale;
  }
}

// The gradient of both addends: that of the sum (dsum, if any), and through the norm (dy).
extern "C" __global__ void __launch_bounds__(128)
    add_layer_norm_backward(const element* sum, const element* dsum, const element* dy, const element* weight, const float* stats,
                            element* dx, int rows, int width) {
  int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
  if (row >= rows) return;
  sum += (size_t)row * width;
  dy += (size_t)row * width;
  dx += (size_t)row * width;
  float mean = stats[2 * (size_t)row], scale = stats[2 * (size_t)row + 1];
  float one = 0.0f, two = 0.0f;
  for (int place = lane * WIDTH; place < width; place += WARP * WIDTH) {
    Pack values = load(sum + place), gradients = load(dy + place), weights = load(weight + place);
    for (int k = 0; k < WIDTH; ++k) {
      Point point(from_element(values.at[k]), from_element(gradients.at[k]), mean, scale, from_element(weights.at[k]), 0.0f, 0);
      one += point.gradient;
      two += point.gradient * point.normal;
    }
  }
  one = sum_of_warp(one) / width;
  two = sum_of_warp(two) / width;
  for (int place = lane * WIDTH; place < width; place += WARP * WIDTH) {
    Pack values = load(sum + place), gradients = load(dy + place), weights = load(weight + place);
    Pack direct = dsum ? load(dsum + (size_t)row * width + place) : values;
    for (int k = 0; k < WIDTH; ++k) {
      Point point(from_element(values.at[k]), from_element(gradients.at[k]), mean, scale, from_element(weights.at[k]), 0.0f, 0);
      float gradient = scale * (point.gradient - one - point.normal * two);
      values.at[k] = to_element(dsum ? from_element(direct.at[k]) + gradient : gradient);
    }
    store(dx + place, values);
  }
}

// Sums of the squared difference of two tensors over parts of each sample: `partials` [N, chunks]. left and right [N, size] lie alike in memory;
// a block takes `packs_per_block` packs.
extern "C" __global__ void __launch_bounds__(256)
    squared_difference_sums(const element* left, const element* right, float* partials, int packs, int packs_per_block) {
  SHARED_FLOATS(scratch);
  size_t sample = (size_t)blockIdx.y * packs * WIDTH;
  int end = (blockIdx.x + 1) * packs_per_block < packs ? (blockIdx.x + 1) * packs_per_block : packs;
  float sum = 0.0f;
  for (int index = blockIdx.x * packs_per_block + threadIdx.x; index < end; index += blockDim.x) {
    Pack one = load(left + sample + (size_t)index * WIDTH), other = load(right + sample + (size_t)index * WIDTH);
    for (int k = 0; k < WIDTH; ++k) {
      float difference = from_element(one.at[k]) - from_element(other.at[k]);
      sum += difference * difference;
    }
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < blockDim.x / WARP; ++warp) sum += scratch[warp];
    partials[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = sum;
  }
}

// The gradient of left from that of each sample's mean of squares, `gradient` [N]; `factor` is two over the size of a sample.
extern "C" __global__ void __launch_bounds__(256)
    squared_difference_gradient(const element* left, const element* right, const float* gradient, element* dleft, int packs, float factor) {
  size_t sample = (size_t)blockIdx.y * packs * WIDTH;
  float scale = gradient[blockIdx.y] * factor;
  for (int index = blockIdx.x * blockDim.x + threadIdx.x; index < packs; index += gridDim.x * blockDim.x) {
    size_t place = sample + (size_t)index * WIDTH;
    Pack one = load(left + place), other = load(right + place);
    for (int k = 0; k < WIDTH; ++k) one.at[k] = to_element((from_element(one.at[k]) - from_element(other.at[k])) * scale);
    store(dleft + place, one);
  }
}

// Packs of a row that a thread of the following kernel holds; as in src/fp8.rs.
#define MAX_PACKS 8

struct __align__(WIDTH) Codes {
  unsigned short at[WIDTH / 2];
};

// Rows in eight bits: codes [rows, width] in E4M3 of x / scale, where a row's scale [rows] makes its largest number 448, the largest there is.
// A block takes a row, and no thread more than MAX_PACKS packs. What is not finite stays so: infinity / infinity is NaN.
extern "C" __global__ void __launch_bounds__(256) rows_to_e4m3(const element* x, unsigned char* codes, float* scales, int width) {
  SHARED_FLOATS(scratch);
  x += (size_t)blockIdx.x * width;
  codes += (size_t)blockIdx.x * width;
  Pack packs[MAX_PACKS];
  float largest = 0.0f;
#pragma unroll
  for (int index = 0; index < MAX_PACKS; ++index) {
    int place = (index * blockDim.x + threadIdx.x) * WIDTH;
    if (place >= width) continue;
    packs[index] = load(x + place);
    for (int k = 0; k < WIDTH; ++k) largest = fmaxf(largest, fabsf(from_element(packs[index].at[k])));
  }
  for (int distance = WARP / 2; distance > 0; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(EVERY_LANE, largest, distance));
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = largest;
  __syncthreads();
  for (int warp = 0; warp < blockDim.x / WARP; ++warp) largest = fmaxf(largest, scratch[warp]);
  // Of a row of zeros any scale is right, but zero.
  largest = fmaxf(largest, 1e-30f);
  float factor = 448.0f / largest;
  if (threadIdx.x == 0) scales[blockIdx.x] = largest / 448.0f;
#pragma unroll
  for (int index = 0; index < MAX_PACKS; ++index) {
    int place = (index * blockDim.x + threadIdx.x) * WIDTH;
    if (place >= width) continue;
    Codes made;
    for (int k = 0; k < WIDTH; k += 2) {
      made.at[k / 2] = floats_to_e4m3(from_element(packs[index].at[k]) * factor, from_element(packs[index].at[k + 1]) * factor);
    }
    *reinterpret_cast<Codes*>(codes + place) = made;
  }
}
