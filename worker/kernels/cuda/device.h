// What the kernels need of a GPU beyond the language: shared memory, and conversions, which the compiler knows without a header as
// instructions only. That to bf16 needs compute capability 8.0.

#define SHARED_FLOATS(name) extern __shared__ float name[]

__device__ static inline float half_to_float(unsigned short value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
}

__device__ static inline unsigned short float_to_half(float value) {
  unsigned short result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}

__device__ static inline float bfloat_to_float(unsigned short value) { return __uint_as_float((unsigned)value << 16); }

__device__ static inline unsigned short float_to_bfloat(float value) {
  unsigned short result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}

// Two numbers in E4M3, the first in the lower byte; those beyond its largest become the largest.
__device__ static inline unsigned short floats_to_e4m3(float first, float second) {
  unsigned short result = 0x7f7f;
  // What is older has no products of such numbers either, and asks for none; there it is NaN.
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(second), "f"(first));
#endif
  return result;
}
