//! Where pieces start within 64 bytes of ASCII, found for all of them at once: GPT-4's pattern as arithmetic on masks.
//!
//! Bit `i` of a mask speaks of byte `i`. Whether a piece starts at a byte follows from the classes of this byte, the
//! two before it and the one after it, but for runs of numbers, contractions and white space around newlines; where
//! the masks cannot tell, the answer ends and one look at each character takes over.

/// Bytes looked at together.
pub const WINDOW: usize = 64;

/// Classes of the bytes of a window. `foreign`: not ASCII, or white space that is neither a space nor a newline.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
struct Masks {
    letters: u64,
    numbers: u64,
    spaces: u64,
    newlines: u64,
    apostrophes: u64,
    foreign: u64,
}

/// The pieces that start in a window.
pub struct Starts {
    /// Where, without the one at its first byte.
    pub at: u64,
    /// True if something after the last of them needs a look at each character.
    pub cut: bool,
}

/// The starts of pieces in a window at whose first byte a piece starts; numbers go in pieces of `max_digits`.
#[inline]
pub fn starts(window: &[u8; WINDOW], max_digits: usize) -> Starts {
    let Masks { letters, numbers, spaces, newlines, apostrophes, foreign } = masks(window);
    let others = !(letters | numbers | spaces | newlines | foreign);
    // ` ?[^\s\p{L}\p{N}]+` takes a run of others and a space before it; a single one without goes with letters.
    let lone = others & !((others | spaces) << 1);
    let at = (letters & ((numbers | newlines | (others & !lone)) << 1))
        | number_starts(numbers, max_digits)
        // The last space of a run goes with what follows, the others are a piece.
        | (spaces & !(spaces << 1 & spaces >> 1))
        | (newlines & (letters | numbers) << 1)
        | (others & (letters | numbers | newlines) << 1);
    // White space that ends in a newline is one piece, whatever it starts with; so spaces count from what follows them.
    let stop = foreign | (newlines & spaces << 1);
    let known = !spaces & below(stop.trailing_zeros());
    let contractions = apostrophes & letters >> 1;
    let end = (u64::BITS - known.leading_zeros()).min(contractions.trailing_zeros() + 1);
    Starts { at: at & below(end) & !1, cut: stop | contractions != 0 }
}

/// The lowest `n` bits.
#[inline]
fn below(n: u32) -> u64 {
    1u64.checked_shl(n).unwrap_or(0).wrapping_sub(1)
}

/// Every `max_digits`-th byte of each run of numbers, from its first.
#[inline]
fn number_starts(numbers: u64, max_digits: usize) -> u64 {
    let mut found = numbers & !(numbers << 1);
    // Numbers with as many before them.
    let far = (0..max_digits).fold(numbers, |far, _| far & far << 1);
    let mut next = found << max_digits & far;
    while next != 0 {
        found |= next;
        next = next << max_digits & far;
    }
    found
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[allow(unsafe_code)]
fn masks(window: &[u8; WINDOW]) -> Masks {
    // SAFETY: SSE2 is part of x86-64, so every processor that runs this has it, and nothing else is asked of a caller:
    // the function is safe code. Splitting runs at 1280 MB/s with it, at 720 with `masks_by_word`.
    unsafe { masks_by_vector(window) }
}

/// With the instructions that every x86-64 processor has, sixteen bytes a step.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "sse2")]
fn masks_by_vector(window: &[u8; WINDOW]) -> Masks {
    use std::arch::x86_64::{
        __m128i, _mm_and_si128, _mm_andnot_si128, _mm_cmpeq_epi8, _mm_cmpgt_epi8, _mm_movemask_epi8, _mm_or_si128,
        _mm_set_epi64x, _mm_set1_epi8,
    };
    let each = |byte: u8| _mm_set1_epi8(byte.cast_signed());
    // Bytes are compared as signed: what is not ASCII is below all that is.
    let between = |bytes, first: u8, last: u8| {
        _mm_and_si128(_mm_cmpgt_epi8(bytes, each(first - 1)), _mm_cmpgt_epi8(each(last + 1), bytes))
    };
    let mut masks = Masks::default();
    for (i, chunk) in window.as_chunks::<16>().0.iter().enumerate() {
        let both = u128::from_le_bytes(*chunk);
        let bytes = _mm_set_epi64x((both >> 64) as i64, both as i64);
        let bits = |flags: __m128i| u64::from(_mm_movemask_epi8(flags).cast_unsigned()) << (16 * i);
        let is = |byte| _mm_cmpeq_epi8(bytes, each(byte));
        let newlines = _mm_or_si128(is(b'\n'), is(b'\r'));
        masks.letters |= bits(between(_mm_or_si128(bytes, each(0x20)), b'a', b'z'));
        masks.numbers |= bits(between(bytes, b'0', b'9'));
        masks.spaces |= bits(is(b' '));
        masks.newlines |= bits(newlines);
        masks.apostrophes |= bits(is(b'\''));
        masks.foreign |= bits(_mm_or_si128(bytes, _mm_andnot_si128(newlines, between(bytes, 0x09, 0x0D))));
    }
    masks
}

/// On any processor, eight bytes a step: what is true of a byte is its highest bit, and a product gathers these bits.
#[cfg(any(test, not(target_arch = "x86_64")))]
fn masks_by_word(window: &[u8; WINDOW]) -> Masks {
    const HIGH: u64 = 0x8080_8080_8080_8080;
    let each = |byte: u8| u64::from_ne_bytes([byte; 8]);
    let mut masks = Masks::default();
    for (i, chunk) in window.as_chunks::<8>().0.iter().enumerate() {
        let bytes = u64::from_le_bytes(*chunk);
        let ascii = bytes & !HIGH;
        let from = |bytes: u64, first: u8| bytes + each(0x80 - first);
        let between = |bytes, first: u8, last: u8| from(bytes, first) & !from(bytes, last + 1) & HIGH;
        let bits = |flags: u64| (flags >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56 << (8 * i);
        let is = |byte| between(ascii, byte, byte) & !bytes;
        let newlines = is(b'\n') | is(b'\r');
        masks.letters |= bits(between(ascii | each(0x20), b'a', b'z') & !bytes);
        masks.numbers |= bits(between(ascii, b'0', b'9') & !bytes);
        masks.spaces |= bits(is(b' '));
        masks.newlines |= bits(newlines);
        masks.apostrophes |= bits(is(b'\''));
        masks.foreign |= bits((between(ascii, 0x09, 0x0D) & !newlines) | (bytes & HIGH));
    }
    masks
}

#[cfg(not(target_arch = "x86_64"))]
use masks_by_word as masks;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classes::{LETTER, NEWLINE, NUMBER, OTHER, SPACE, classes};

    #[test]
    fn masks_are_the_classes_of_the_bytes() {
        for byte in 0..=255u8 {
            for at in 0..WINDOW {
                let mut window = [b'.'; WINDOW];
                window[at] = byte;
                let found = masks(&window);
                assert_eq!(found, masks_by_word(&window));
                let Masks { letters, numbers, spaces, newlines, apostrophes, foreign } = found;
                let has = |mask: u64| mask == 1 << at;
                assert_eq!(has(apostrophes), byte == b'\'');
                assert_eq!(has(foreign), byte >= 0x80 || (classes().at(&window, at).0 == SPACE && byte != b' '));
                if byte < 0x80 {
                    let class = classes().at(&window, at).0;
                    assert_eq!(has(letters), class == LETTER);
                    assert_eq!(has(numbers), class == NUMBER);
                    assert_eq!(has(spaces | foreign), class == SPACE);
                    assert_eq!(has(newlines), class == NEWLINE);
                    assert_eq!(letters | numbers | spaces | newlines | foreign == 0, class == OTHER);
                }
            }
        }
    }

    #[test]
    fn numbers_start_every_few_digits() {
        let numbers = 0b1_0111_1111_0011_0001;
        assert_eq!(number_starts(numbers, 3), 0b1_0000_1001_0001_0001 | 1 << 14);
        assert_eq!(number_starts(numbers, 1), numbers);
        assert_eq!(number_starts(u64::MAX, 9), 1 | 1 << 9 | 1 << 18 | 1 << 27 | 1 << 36 | 1 << 45 | 1 << 54 | 1 << 63);
    }
}
