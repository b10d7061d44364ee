//! A matrix (outputs, inputs) as a decode step reads it: in tiles of sixteen outputs, whose numbers lie by input.

/// Outputs of a tile.
pub const LANES: usize = 16;

/// A stored number.
pub trait Stored: Copy + Default + Send + Sync {
    /// The number as it is multiplied.
    fn value(self) -> f32;

    /// The nearest number of its kind.
    fn of(number: f32) -> Self;
}

impl Stored for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }

    #[inline(always)]
    fn of(number: f32) -> Self {
        number
    }
}

/// The upper half of an fp32 number, which is bf16.
impl Stored for u16 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    /// Of two as near the even one; a NaN stays one.
    #[inline(always)]
    fn of(number: f32) -> Self {
        let bits = number.to_bits();
        if number.is_nan() { (bits >> 16) as u16 | 0x40 } else { ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16 }
    }
}

impl Stored for i8 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    fn of(number: f32) -> Self {
        number.round() as i8
    }
}

/// What the numbers are stored in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Precision {
    /// fp32.
    Full,
    /// bf16.
    Half,
    /// int8, with a factor for each output: its largest number is 127 of them.
    Quarter,
}

/// The numbers, (tiles, inputs, `LANES`); behind the last output are zeros.
pub enum Tiles {
    /// As they are.
    Full(Vec<[f32; LANES]>),
    /// bf16.
    Half(Vec<[u16; LANES]>),
    /// int8 and the factor of each output.
    Quarter(Vec<[i8; LANES]>, Vec<f32>),
}

/// A packed matrix.
pub struct Matrix {
    /// Columns.
    pub inputs: usize,
    /// See there.
    pub tiles: Tiles,
    count: usize,
}

impl Matrix {
    /// Packs rows of `inputs` numbers each.
    pub fn pack(numbers: &[f32], inputs: usize, precision: Precision) -> Self {
        let rows: Vec<&[f32]> = numbers.chunks_exact(inputs).collect();
        let count = rows.len().div_ceil(LANES);
        let at = |tile: usize, i: usize, lane: usize| rows.get(tile * LANES + lane).map_or(0.0, |row| row[i]);
        let tiles = match precision {
            Precision::Full => Tiles::Full(packed(count, inputs, at)),
            Precision::Half => Tiles::Half(packed(count, inputs, |t, i, l| u16::of(at(t, i, l)))),
            Precision::Quarter => {
                let most = |row: &&[f32]| row.iter().fold(0.0f32, |most, number| most.max(number.abs()));
                let scales: Vec<f32> = rows.iter().map(|row| (most(row) / 127.0).max(f32::MIN_POSITIVE)).collect();
                let scale = |row: usize| scales.get(row).copied().unwrap_or(1.0);
                let whole = |t: usize, i: usize, l: usize| i8::of(at(t, i, l) / scale(t * LANES + l));
                Tiles::Quarter(packed(count, inputs, whole), (0..count * LANES).map(scale).collect())
            }
        };
        Self { inputs, tiles, count }
    }

    /// The number of tiles.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Outputs, those of zeros among them.
    pub fn width(&self) -> usize {
        self.count * LANES
    }
}

fn packed<W>(count: usize, inputs: usize, number: impl Fn(usize, usize, usize) -> W) -> Vec<[W; LANES]> {
    let place = |at: usize| std::array::from_fn(|lane| number(at / inputs, at % inputs, lane));
    (0..count * inputs).map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::super::kernels::product;
    use super::*;
    use proptest::prelude::*;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn products(matrix: &Matrix, x: &[f32], parts: usize) -> Vec<f32> {
        let rows = x.len() / matrix.inputs;
        let mut whole = vec![f32::NAN; rows * matrix.width()];
        let step = matrix.count().div_ceil(parts).max(1);
        for first in (0..matrix.count()).step_by(step) {
            let range = first..(first + step).min(matrix.count());
            let width = range.len() * LANES;
            let mut part = vec![f32::NAN; rows * width];
            product(matrix, range, x, &mut part);
            for (row, piece) in part.chunks_exact(width).enumerate() {
                whole[row * matrix.width() + first * LANES..][..width].copy_from_slice(piece);
            }
        }
        whole
    }

    proptest! {
        #[test]
        fn products_are_sums_whatever_rows_and_parts(
            outputs in 1usize..100, inputs in 1usize..70, rows in 1usize..10, parts in 1usize..4, seed: u64,
        ) {
            let (weights, x) = (numbers(outputs * inputs, seed), numbers(rows * inputs, !seed));
            for (precision, error) in [(Precision::Full, 1e-6), (Precision::Half, 4e-3), (Precision::Quarter, 4e-3)] {
                let matrix = Matrix::pack(&weights, inputs, precision);
                let found = products(&matrix, &x, parts);
                prop_assert_eq!(&found, &products(&matrix, &x, 1));
                for (row, line) in x.chunks_exact(inputs).enumerate() {
                    prop_assert_eq!(&found[row * matrix.width()..][..matrix.width()], &products(&matrix, line, 1)[..]);
                    for output in 0..outputs {
                        let pairs = line.iter().zip(&weights[output * inputs..]);
                        let right: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        let near = f64::from(found[row * matrix.width() + output]) - right;
                        prop_assert!(near.abs() <= error * inputs as f64, "{precision:?} {near}");
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_rounds_to_the_nearest_even() {
        for (number, bits) in [(1.0, 0x3F80), (1.003_906_2, 0x3F80), (1.011_718_8, 0x3F82), (-3.0, 0xC040)] {
            assert_eq!(u16::of(number), bits, "{number}");
        }
        assert_eq!(u16::of(f32::INFINITY), 0x7F80);
        assert!(u16::of(f32::NAN).value().is_nan());
    }
}
