// What several kernels use: where a chunk is, where a tile's numbers are, and gates.
#define LOG2E 1.4426950408889634f
#define NORM_EPS 1e-6f

// Where 16 bytes of a row are in tiles of [64, 64]: a row has 128 bytes, its pieces are at piece ^ row % 8, so that neither
// rows nor columns of pieces share banks. Wider rows are several tiles.
DEVICE int place(int row, int piece) { return (piece >> 3) * 8192 + row * 128 + (((piece & 7) ^ (row & 7)) << 4); }
// two bfloat16 numbers of a word
DEVICE float low(u32 x) { return float_of(x << 16); }
DEVICE float high(u32 x) { return float_of(x & 0xffff0000u); }

struct Documents {
  const int* bounds;  // of packed documents, [number + 1], or null
  int number, tokens;
};
// Finds the first token of a document and the first one after it. Both are within the tokens, whatever the bounds are.
DEVICE void bounds_of(const Documents& of, int document, int& begin, int& end) {
  if (!of.bounds) {
    begin = document * of.tokens;
    end = begin + of.tokens;
    return;
  }
  begin = max(min(of.bounds[document], of.tokens), 0);
  end = max(min(of.bounds[document + 1], of.tokens), begin);
}
// Finds how many chunks the documents of a group of 32 and all before them have, for the lane's document.
DEVICE int chunks_until(const Documents& of, int group, int before) {
  const int lane = THREAD & 31;
  int begin = 0, end = 0;
  if (group + lane < of.number) bounds_of(of, group + lane, begin, end);
  int sum = (end - begin + 63) / 64;
  UNROLL for (int n = 1; n < 32; n *= 2) {
    const int x = from_lane_before(sum, n);
    if (lane >= n) sum += x;
  }
  return before + sum;
}
// Finds the chunk's first token and number of tokens. False if there is no such chunk.
DEVICE bool locate(const Documents& of, int chunk, int& first, int& have) {
  int document, before, begin, end;  // chunks before the document
  if (!of.bounds) {
    const int chunks = (of.tokens + 63) / 64;
    document = chunk / chunks;
    before = document * chunks;
  } else {
    for (int group = before = 0;; group += 32) {
      if (group >= of.number) return false;
      const int until = chunks_until(of, group, before);
      if (const u32 found = ballot(until > chunk)) {
        const int lane = first_set(found);
        document = group + lane;
        const int x = from_lane_before(until, 1);
        before = from_lane((THREAD & 31) == 0 ? before : x, lane);
        break;
      }
      before = from_lane(until, 31);
    }
  }
  bounds_of(of, document, begin, end);
  first = begin + 64 * (chunk - before);
  have = min(64, end - first);
  return true;
}

#ifdef BOUNDED
// Times a factor of its head this is minus a token's log2-decay; x is the decay logit times `slope` of the kernel.
DEVICE float forget(float x) {
#if BOUNDED
  return inverse(1.f + exp2_(-x));
#else
  const float e = exp2_(-fabsf(x));  // log2(1 + e) = e p(e), relative error 8e-6
  float p = e * -0.03443584f + 0.14603271f;
  p = p * e - 0.30303604f;
  p = p * e + 0.46917400f;
  p = p * e - 0.72042615f;
  p = p * e + 1.44268292f;
  return e * p + fmaxf(x, 0.f);
#endif
}
#endif
