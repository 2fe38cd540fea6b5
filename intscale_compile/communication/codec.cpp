// Messages of the quantized collectives on a CPU, the bits of reference.py in one pass over the data.
//
// Compiled on first use by cpu_codec.py, for one GROUP_SIZE and SPIKE_RESERVING, without contraction to multiply-add and without relaxed floating point. Loops over
// one group have constant trip counts, so that the compiler turns them into vector instructions.

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;
constexpr float MAGIC = 8388608.0f;  // 2**23: fp32 from here on has no fraction
constexpr float SMALLEST_SCALE = 0x1p-100f;
constexpr uint16_t NAN_BF16 = 0x7FC0;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct BFloat16 {
  uint16_t bits;
  static float load(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
  static BFloat16 store(float x) {  // ties to even
    const uint32_t b = bits_of(x);
    const uint32_t rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
    return {uint16_t((b & 0x7FFFFFFF) > 0x7F800000 ? uint32_t(NAN_BF16) : rounded)};
  }
};

struct Float {
  float value;
  static float load(Float x) { return x.value; }
  static Float store(float x) { return {x}; }
};

struct Half {
  _Float16 value;
  static float load(Half x) { return float(x.value); }
  static Half store(float x) { return {_Float16(x)}; }
};

// Pointers to the parts of a message (message.py).
template <int BITS, int G>
struct Parts {
  static constexpr int PLANE = BITS == 8 ? 0 : G * (BITS - 4) / 8;  // bytes of the high bits of a group
  uint8_t *codes, *plane, *scales, *minimums, *values, *positions, *end;
  Parts(const uint8_t* message, int64_t groups, bool spikes) {
    codes = const_cast<uint8_t*>(message);
    plane = codes + groups * (G / 2);
    scales = codes + groups * (G * BITS / 8);
    minimums = scales + 2 * groups;
    values = minimums + 2 * groups;
    positions = values + 4 * groups;
    end = spikes ? positions + 2 * groups : values;
  }
};

inline void put(uint8_t* part, int64_t index, uint16_t bits) { std::memcpy(part + 2 * index, &bits, 2); }

inline float get(const uint8_t* part, int64_t index) {
  uint16_t bits;
  std::memcpy(&bits, part + 2 * index, 2);
  return from_bits(uint32_t(bits) << 16);
}

template <int G>
inline void ends(const float* v, float& low, float& high) {
  float least[LANES], most[LANES];
  for (int l = 0; l < LANES; ++l) least[l] = most[l] = v[l];
  for (int i = LANES; i < G; i += LANES)
    for (int l = 0; l < LANES; ++l) {
      least[l] = v[i + l] < least[l] ? v[i + l] : least[l];
      most[l] = v[i + l] > most[l] ? v[i + l] : most[l];
    }
  low = least[0], high = most[0];
  for (int l = 1; l < LANES; ++l) {
    low = least[l] < low ? least[l] : low;
    high = most[l] > high ? most[l] : high;
  }
}

// Sum of products with 0: NaN where an element is NaN or infinite.
template <int G>
inline float poison(const float* v) {
  float sum[LANES] = {};
  for (int i = 0; i < G; i += LANES)
    for (int l = 0; l < LANES; ++l) sum[l] += v[i + l] * 0.0f;
  float all = 0.0f;
  for (int l = 0; l < LANES; ++l) all += sum[l];
  return all;
}

// Quantize the group of `valid` fp32 values, `v` [G], into group `index` of a message. `v` is overwritten behind `valid`.
template <int BITS, int G, bool SPIKES>
inline void encode_group(float* v, int valid, const Parts<BITS, G>& to, int64_t index) {
  constexpr int PLANE = Parts<BITS, G>::PLANE;
  // Copies of the first element change neither end of the range; their codes are cleared below.
  const float filler = valid ? v[0] : 0.0f;
  for (int i = valid; i < G; ++i) v[i] = filler;
  float low, high;
  ends<G>(v, low, high);
  bool bad = !(poison<G>(v) == 0.0f) || !(high - low < __builtin_inff());
  int position[2] = {0, 0};
  const float spike[2] = {low, high};
  if (SPIKES && !bad) {
    while (v[position[0]] != low) ++position[0];
    while (v[position[1]] != high) ++position[1];
    // The range of the others: spikes and what lies behind `valid` become copies of one of them.
    int other = 0;
    while (other < valid && (other == position[0] || other == position[1])) ++other;
    const float rest = other < valid ? v[other] : 0.0f;
    for (int i = valid; i < G; ++i) v[i] = rest;
    v[position[0]] = v[position[1]] = rest;
    ends<G>(v, low, high);
  }
  uint32_t down = bits_of(low);
  down = (down & 0xFFFF0000u) + ((down >> 31) && (down & 0xFFFF) ? 0x10000u : 0u);
  const float minimum = low == 0.0f ? 0.0f : from_bits(down);
  const float extent = high - minimum;
  bad = bad || !(extent < __builtin_inff());
  if (bad) {
    put(to.scales, index, NAN_BF16);
    put(to.minimums, index, NAN_BF16);
    for (int k = 0; SPIKES && k < 2; ++k) {
      put(to.values, 2 * index + k, NAN_BF16);
      to.positions[2 * index + k] = 0;
    }
    std::memset(to.codes + index * (BITS == 8 ? G : G / 2), 0, BITS == 8 ? G : G / 2);
    if (PLANE) std::memset(to.plane + index * PLANE, 0, PLANE);
    return;
  }
  float scale = from_bits((bits_of(extent / (BITS == 8 ? 254.0f : float((1 << BITS) - 1))) + 0xFFFF) & 0xFFFF0000u);
  scale = scale < SMALLEST_SCALE ? SMALLEST_SCALE : scale;
  const float inverse = 1.0f / scale;
  // No clamp: minimum <= v, and scale * the largest code >= high - minimum.
  uint8_t code[G];
  for (int i = 0; i < G; ++i) code[i] = uint8_t(bits_of((v[i] - minimum) * inverse + MAGIC));
  if (SPIKES) code[position[0]] = code[position[1]] = 0;
  for (int i = valid; i < G; ++i) code[i] = 0;
  if (BITS == 8) {
    std::memcpy(to.codes + index * G, code, G);
  } else {
    uint8_t* __restrict bytes = to.codes + index * (G / 2);
    for (int j = 0; j < G / 2; ++j) bytes[j] = uint8_t((code[j] & 15) | (code[j + G / 2] << 4));
  }
  if (BITS == 5) {
    uint8_t plane[G / 8] = {};
    for (int k = 0; k < 8; ++k)
      for (int j = 0; j < G / 8; ++j) plane[j] |= uint8_t((code[j + k * (G / 8)] >> 4) << k);
    std::memcpy(to.plane + index * PLANE, plane, PLANE);
  }
  if (BITS == 6) {
    uint8_t* __restrict plane = to.plane + index * PLANE;
    for (int j = 0; j < G / 4; ++j) {
      const uint8_t *low = code + 2 * j, *high = code + 2 * j + G / 2;
      plane[j] = uint8_t((low[0] >> 4) | ((low[1] >> 4) << 2) | ((high[0] >> 4) << 4) | ((high[1] >> 4) << 6));
    }
  }
  put(to.scales, index, uint16_t(bits_of(scale) >> 16));
  put(to.minimums, index, uint16_t(bits_of(minimum) >> 16));
  for (int k = 0; SPIKES && k < 2; ++k) {
    put(to.values, 2 * index + k, valid && spike[k] != 0.0f ? BFloat16::store(spike[k]).bits : 0);
    to.positions[2 * index + k] = uint8_t(position[k]);
  }
}

// fp32 values [G] of group `index`.
template <int BITS, int G, bool SPIKES>
inline void decode_group(const Parts<BITS, G>& from, int64_t index, float* __restrict v) {
  const float scale = get(from.scales, index), minimum = get(from.minimums, index);
  if (BITS == 8) {
    const uint8_t* __restrict code = from.codes + index * G;
    for (int i = 0; i < G; ++i) v[i] = minimum + float(code[i]) * scale;
  } else {
    const uint8_t* __restrict bytes = from.codes + index * (G / 2);
    const uint8_t* __restrict plane = from.plane + index * (Parts<BITS, G>::PLANE);
    uint8_t high[G] = {};
    if (BITS == 5) {
      for (int k = 0; k < 8; ++k)
        for (int j = 0; j < G / 8; ++j) high[j + k * (G / 8)] = ((plane[j] >> k) & 1) << 4;
    }
    if (BITS == 6) {
      for (int j = 0; j < G / 4; ++j) {
        uint8_t *low = high + 2 * j, *up = high + 2 * j + G / 2;
        low[0] = uint8_t((plane[j] & 3) << 4), low[1] = uint8_t((plane[j] & 12) << 2);
        up[0] = uint8_t(plane[j] & 48), up[1] = uint8_t((plane[j] >> 6) << 4);
      }
    }
    for (int j = 0; j < G / 2; ++j) v[j] = minimum + float((bytes[j] & 15) | high[j]) * scale;
    for (int j = 0; j < G / 2; ++j) v[j + G / 2] = minimum + float((bytes[j] >> 4) | high[j + G / 2]) * scale;
  }
  for (int k = 0; SPIKES && k < 2; ++k) v[from.positions[2 * index + k] % G] = get(from.values, 2 * index + k);
}

inline int clamp_to(int64_t count, int limit) { return int(count < 0 ? 0 : count < limit ? count : limit); }

template <typename T, int G>
inline void load_group(const T* __restrict x, int valid, float* __restrict v) {
  if (valid == G) {
    for (int i = 0; i < G; ++i) v[i] = T::load(x[i]);
  } else {
    for (int i = 0; i < valid; ++i) v[i] = T::load(x[i]);
  }
}

template <typename T, int G>
inline void store_group(T* __restrict out, int valid, const float* __restrict v) {
  if (valid == G) {
    for (int i = 0; i < G; ++i) out[i] = T::store(v[i]);
  } else {
    for (int i = 0; i < valid; ++i) out[i] = T::store(v[i]);
  }
}

struct Call {
  const void* x;            // own elements
  const uint8_t* received;  // messages, `row_bytes` apart
  void* out;                // message or elements
  int64_t elements, groups, row_bytes, out_bytes;
  int rank, ranks;
};

template <typename T, int BITS, int G, bool SPIKES>
void encode(const Call& call) {
  Parts<BITS, G> to(static_cast<uint8_t*>(call.out), call.groups, SPIKES);
  for (int64_t index = 0; index < call.groups; ++index) {
    float v[G];
    const int valid = clamp_to(call.elements - index * G, G);
    load_group<T, G>(static_cast<const T*>(call.x) + index * G, valid, v);
    encode_group<BITS, G, SPIKES>(v, valid, to, index);
  }
  std::memset(to.end, 0, static_cast<uint8_t*>(call.out) + call.out_bytes - to.end);
}

// OUT_BITS 0: to elements.
template <typename T, int BITS, int OUT_BITS, int G, bool SPIKES>
void reduce(const Call& call) {
  Parts<OUT_BITS ? OUT_BITS : 8, G> to(static_cast<uint8_t*>(call.out), call.groups, SPIKES);
  for (int64_t index = 0; index < call.groups; ++index) {
    float sum[G] = {}, v[G];
    const int valid = clamp_to(call.elements - index * G, G);
    const uint8_t* message = call.received;
    for (int other = 0; other < call.ranks; ++other) {
      if (other == call.rank) {
        load_group<T, G>(static_cast<const T*>(call.x) + index * G, valid, v);
        for (int i = valid; i < G; ++i) v[i] = 0.0f;
      } else {
        decode_group<BITS, G, SPIKES>(Parts<BITS, G>(message, call.groups, SPIKES), index, v);
        message += call.row_bytes;
      }
      for (int i = 0; i < G; ++i) sum[i] += v[i];
    }
    if (OUT_BITS)
      encode_group<OUT_BITS ? OUT_BITS : 8, G, SPIKES>(sum, valid, to, index);
    else
      store_group<T, G>(static_cast<T*>(call.out) + index * G, valid, sum);
  }
  if (OUT_BITS) std::memset(to.end, 0, static_cast<uint8_t*>(call.out) + call.out_bytes - to.end);
}

template <typename T, int BITS, int G, bool SPIKES>
void decode(const Call& call) {
  const Parts<BITS, G> from(call.received, call.groups, SPIKES);
  for (int64_t index = 0; index * G < call.elements; ++index) {
    float v[G];
    decode_group<BITS, G, SPIKES>(from, index, v);
    store_group<T, G>(static_cast<T*>(call.out) + index * G, clamp_to(call.elements - index * G, G), v);
  }
}

enum Action { ENCODE, REDUCE, DECODE };

template <typename T, int BITS, int OUT_BITS>
void run(int action, const Call& call) {
  if (action == REDUCE) reduce<T, BITS, OUT_BITS, GROUP_SIZE, SPIKE_RESERVING>(call);
  if constexpr (OUT_BITS == 0) {
    if (action == ENCODE) encode<T, BITS, GROUP_SIZE, SPIKE_RESERVING>(call);
    if (action == DECODE) decode<T, BITS, GROUP_SIZE, SPIKE_RESERVING>(call);
  }
}

template <typename T>
int with_bits(int action, const Call& call, int bits, int out_bits) {
#define FORMAT(in, out) \
  if (bits == in && out_bits == out) return run<T, in, out>(action, call), 0;
  FORMAT(8, 0) FORMAT(6, 0) FORMAT(5, 0) FORMAT(4, 0) FORMAT(8, 8) FORMAT(6, 6) FORMAT(4, 8) FORMAT(5, 5) FORMAT(4, 4)
#undef FORMAT
  return 1;
}

}  // namespace

// action: 0 encode, 1 reduce, 2 decode. dtype: 0 fp32, 1 bf16, 2 fp16. Returns 0, or 1 for a format that is not built.
extern "C" int intscale_codec(
    int action, int dtype, int bits, int out_bits, const void* x, const void* received, void* out, int64_t elements,
    int64_t groups, int64_t row_bytes, int64_t out_bytes, int rank, int ranks) {
  const Call call{x, static_cast<const uint8_t*>(received), out, elements, groups, row_bytes, out_bytes, rank, ranks};
  if (dtype == 0) return with_bits<Float>(action, call, bits, out_bits);
  if (dtype == 1) return with_bits<BFloat16>(action, call, bits, out_bits);
  return with_bits<Half>(action, call, bits, out_bits);
}
