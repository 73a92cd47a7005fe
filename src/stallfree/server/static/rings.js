// Series of which only the latest are kept, so that a page may stay open for weeks.

/** Values of any kind, each with a number that counts up. */
export class Ring {
  constructor(size) {
    this.size = size;
    this.slots = [];
    this.count = 0;
  }

  /** The number of the oldest one kept. */
  get first() {
    return Math.max(0, this.count - this.size);
  }

  push(value) {
    this.slots[this.count % this.size] = value;
    this.count += 1;
  }

  at(number) {
    return this.slots[number % this.size];
  }

  get last() {
    return this.count ? this.at(this.count - 1) : undefined;
  }

  /** The number of the first one for which `isThere` holds; it must hold for all after that too. */
  find(isThere) {
    let low = this.first;
    let high = this.count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (isThere(this.at(middle))) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

/** Times in ascending order: grows up to a limit, then forgets the oldest half. */
export class Times {
  constructor(most = 8192) {
    this.most = most;
    this.values = new Float64Array(64);
    this.length = 0;
  }

  push(time) {
    if (this.length === this.values.length) this.makeRoom();
    this.values[this.length++] = time;
  }

  makeRoom() {
    if (this.length < this.most) {
      const larger = new Float64Array(this.length * 2);
      larger.set(this.values);
      this.values = larger;
    } else {
      this.values.copyWithin(0, this.length >> 1);
      this.length -= this.length >> 1;
    }
  }

  get last() {
    return this.length ? this.values[this.length - 1] : undefined;
  }

  /** The place of the first time at or after `time`. */
  place(time) {
    let low = 0;
    let high = this.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.values[middle] >= time) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

/** Samples of a duration: when, how long, and its target (NaN: none). */
export class Samples {
  constructor(size) {
    this.size = size;
    this.at = new Float64Array(size);
    this.value = new Float32Array(size);
    this.target = new Float32Array(size);
    this.scratch = new Float32Array(size); // to sort in
    this.count = 0;
  }

  push(at, value, target) {
    const slot = this.count++ % this.size;
    this.at[slot] = at;
    this.value[slot] = value;
    this.target[slot] = target;
  }

  /** Percentiles, the worst, and how many are over their limit, of those from `start` to `end`. */
  summary(start, end, limitOf) {
    let found = 0;
    let over = 0;
    let limited = 0;
    const oldest = Math.max(0, this.count - this.size);
    for (let number = this.count - 1; number >= oldest; number--) {
      const slot = number % this.size;
      if (this.at[slot] < start) break;
      if (this.at[slot] > end) continue;
      this.scratch[found++] = this.value[slot];
      const limit = limitOf(this.target[slot]);
      if (limit === Infinity) continue;
      limited += 1;
      if (this.value[slot] > limit) over += 1;
    }
    const sorted = this.scratch.subarray(0, found).sort();
    const percentile = (share) => sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)];
    return {
      count: sorted.length,
      p50: percentile(0.5),
      p90: percentile(0.9),
      p99: percentile(0.99),
      worst: sorted[sorted.length - 1],
      over,
      limited,
    };
  }
}
