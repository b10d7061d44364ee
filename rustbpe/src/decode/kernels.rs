//! The loops in which the time goes: products with a packed matrix, attention of one query, exponentials.
//!
//! Each is written once, over arrays of fixed length, for the compiler to turn into vector instructions; on x86-64 it is
//! compiled a second time with AVX2 and FMA, and what the processor has is asked at each call. The order in which a sum
//! is added up depends on its length alone, never on other rows or on the number of threads.

use std::ops::Range;

use super::matrix::{LANES, Matrix, Stored, Tiles};

/// Defines a function of the crate that runs `$inner::<FUSED>`, with AVX2 and FMA where the processor has them.
macro_rules! vectorized {
    ($(#[doc = $doc:literal])* $name:ident<$of:ident>($($arg:ident: $kind:ty),* $(,)?) = $inner:ident) => {
        $(#[doc = $doc])*
        #[allow(unsafe_code)]
        pub fn $name<$of: Stored>($($arg: $kind),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn wide<$of: Stored>($($arg: $kind),*) {
                    $inner::<$of, true>($($arg),*);
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the processor has both features, and nothing else is asked of a caller: the function is
                    // safe code.
                    return unsafe { wide::<$of>($($arg),*) };
                }
            }
            $inner::<$of, { cfg!(target_arch = "aarch64") }>($($arg),*);
        }
    };
}

vectorized! {
    /// Products of rows with some tiles of a matrix: `x` is (rows, inputs), `out` is (rows, tiles, `LANES`).
    product_of<W>(stored: &[[W; LANES]], inputs: usize, tiles: Range<usize>, x: &[f32], out: &mut [f32]) = product_with
}

vectorized! {
    /// Attention of one query (D) over keys and values (n, D): `out` (D) is their mean, weighted by the softmax.
    attend<K>(query: &[f32], scale: f32, keys: &[&[K]], values: &[&[K]], out: &mut [f32]) = attend_with
}

vectorized! {
    /// `cap * tanh(z / cap)` of each number, in place.
    softcap<N>(numbers: &mut [N], cap: f32) = softcap_with
}

/// Products of rows with some tiles of a matrix: `x` is (rows, inputs), `out` is (rows, tiles, `LANES`).
pub fn product(matrix: &Matrix, tiles: Range<usize>, x: &[f32], out: &mut [f32]) {
    match &matrix.tiles {
        Tiles::Full(stored) => product_of(stored, matrix.inputs, tiles, x, out),
        Tiles::Half(stored) => product_of(stored, matrix.inputs, tiles, x, out),
        Tiles::Quarter(stored, scales) => {
            product_of(stored, matrix.inputs, tiles.clone(), x, out);
            for row in out.chunks_exact_mut((tiles.len() * LANES).max(1)) {
                for (value, scale) in row.iter_mut().zip(&scales[tiles.start * LANES..]) {
                    *value *= scale;
                }
            }
        }
    }
}

/// a * b + c, rounded once where the processor does that.
#[inline(always)]
fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// A tile is read once for all rows, of which as many as registers hold are taken at a time; few rows take more tiles.
#[inline(always)]
fn product_with<W: Stored, const FUSED: bool>(
    stored: &[[W; LANES]],
    inputs: usize,
    tiles: Range<usize>,
    x: &[f32],
    out: &mut [f32],
) {
    let (rows, count) = (x.len() / inputs, tiles.len());
    let stored = &stored[tiles.start * inputs..tiles.end * inputs];
    let mut tile = 0;
    while tile < count {
        let wide = match rows {
            1 if tile + 4 <= count => 4,
            2 if tile + 2 <= count => 2,
            _ => 1,
        };
        let (weights, after) = stored[tile * inputs..].split_at(wide * inputs);
        let mut row = 0;
        while row < rows {
            // Evenly: 16 rows are 6, 5 and 5.
            let taken = (rows - row).div_ceil((rows - row).div_ceil(6));
            let x = &x[row * inputs..(row + taken) * inputs];
            let out = &mut out[(row * count + tile) * LANES..];
            match (wide, taken) {
                (4, _) => block::<W, 4, 1, FUSED>(weights, after, x, inputs, count, out),
                (2, _) => block::<W, 2, 2, FUSED>(weights, after, x, inputs, count, out),
                (_, 1) => block::<W, 1, 1, FUSED>(weights, after, x, inputs, count, out),
                (_, 2) => block::<W, 1, 2, FUSED>(weights, after, x, inputs, count, out),
                (_, 3) => block::<W, 1, 3, FUSED>(weights, after, x, inputs, count, out),
                (_, 4) => block::<W, 1, 4, FUSED>(weights, after, x, inputs, count, out),
                (_, 5) => block::<W, 1, 5, FUSED>(weights, after, x, inputs, count, out),
                _ => block::<W, 1, 6, FUSED>(weights, after, x, inputs, count, out),
            }
            row += taken;
        }
        tile += wide;
    }
}

/// The sums of R rows over T tiles, each in the order of the inputs; rows of `out` are `count` tiles apart. Meanwhile the
/// weights `after` these are fetched, for the products are done before memory has given them.
#[inline(always)]
fn block<W: Stored, const T: usize, const R: usize, const FUSED: bool>(
    stored: &[[W; LANES]],
    after: &[[W; LANES]],
    x: &[f32],
    inputs: usize,
    count: usize,
    out: &mut [f32],
) {
    let mut sums = [[[0.0; LANES]; T]; R];
    let tiles: [&[[W; LANES]]; T] = std::array::from_fn(|t| &stored[t * inputs..][..inputs]);
    let x: [&[f32]; R] = std::array::from_fn(|r| &x[r * inputs..][..inputs]);
    for i in 0..inputs {
        for t in 0..T {
            prefetch(after, t * inputs + i);
            let weights = tiles[t][i].map(W::value);
            for r in 0..R {
                for l in 0..LANES {
                    sums[r][t][l] = multiply_add::<FUSED>(weights[l], x[r][i], sums[r][t][l]);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        out[r * count * LANES..][..T * LANES].copy_from_slice(sums.as_flattened());
    }
}

/// Lets memory bring a place of `numbers`, if there is one, while something else is computed.
#[inline(always)]
#[allow(unsafe_code)]
fn prefetch<T>(numbers: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which neither reads nor writes nor fails, wherever the address points; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(numbers.as_ptr().wrapping_add(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (numbers, at);
}

/// The dot product, added up in `LANES` sums and then pair by pair.
#[inline(always)]
fn dot<K: Stored, const FUSED: bool>(a: &[f32], b: &[K]) -> f32 {
    let mut sums = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            sums[l] = multiply_add::<FUSED>(a[l], b[l].value(), sums[l]);
        }
    }
    for (l, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[l] = multiply_add::<FUSED>(*a, b.value(), sums[l]);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            sums[l] += sums[l + half];
        }
        half /= 2;
    }
    sums[0]
}

#[inline(always)]
fn attend_with<K: Stored, const FUSED: bool>(
    query: &[f32],
    scale: f32,
    keys: &[&[K]],
    values: &[&[K]],
    out: &mut [f32],
) {
    let mut weights: Vec<f32> = keys.iter().map(|key| scale * dot::<K, FUSED>(query, key)).collect();
    let most = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for weight in &mut weights {
        *weight = exp::<FUSED>(*weight - most);
    }
    let total: f32 = weights.iter().sum();
    out.fill(0.0);
    for (value, weight) in values.iter().zip(&weights) {
        for (sum, value) in out.iter_mut().zip(*value) {
            *sum = multiply_add::<FUSED>(*weight, value.value(), *sum);
        }
    }
    for sum in out {
        *sum /= total;
    }
}

#[inline(always)]
fn softcap_with<N: Stored, const FUSED: bool>(numbers: &mut [N], cap: f32) {
    let double = 2.0 / cap;
    for z in numbers {
        // tanh y = 1 - 2 / (e^2y + 1); beyond 40 it is 1 to the last bit, and the exponential stays a number.
        *z = N::of(cap - 2.0 * cap / (exp::<FUSED>((z.value() * double).clamp(-80.0, 80.0)) + 1.0));
    }
}

/// e^x for -87 < x < 88 to two units in the last place, and 0 below: 2^n e^r with |r| <= ln 2 / 2 and Taylor's polynomial
/// of r. Nothing in it branches, so a loop over it becomes vector instructions.
#[inline(always)]
pub fn exp<const FUSED: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: what is added to it is rounded to an integer
    let clamped = x.max(-87.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, of which the first has so few bits that n times it is exact.
    let r = multiply_add::<FUSED>(n, -0.693_359_4, clamped);
    let r = multiply_add::<FUSED>(n, 2.121_944_4e-4, r);
    let mut sum = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = multiply_add::<FUSED>(sum, r, factor);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23)); // n is in the lowest bits
    if x < -87.0 { 0.0 } else { sum * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_those_of_the_library() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let right = f64::from(x).exp();
            for found in [exp::<true>(x), exp::<false>(x)] {
                assert!((f64::from(found) / right - 1.0).abs() < 2.5e-7, "{x} {found} {right}");
            }
        }
        assert!(exp::<true>(-100.0) + exp::<false>(f32::NEG_INFINITY) <= 0.0);
    }

    #[test]
    fn softcap_is_that_of_the_library() {
        let mut numbers: Vec<f32> = (-40_000..40_000).map(|i| i as f32 / 100.0).collect();
        let right: Vec<f32> = numbers.iter().map(|z| 15.0 * (z / 15.0).tanh()).collect();
        softcap(&mut numbers, 15.0);
        for (found, right) in numbers.iter().zip(right) {
            assert!((found - right).abs() < 4e-6, "{found} {right}");
        }
    }
}
