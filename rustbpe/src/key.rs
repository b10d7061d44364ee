//! Short pieces as one integer, so that looking one up is a comparison of two words and no memory is chased.

use std::num::NonZeroU128;

/// Longest piece, in bytes, that fits a key.
pub const MAX_SHORT: usize = 15;

/// A piece of 1 to [`MAX_SHORT`] bytes as an integer, which other pieces do not have. "No key" is `None`, so a table
/// whose free slots are `None` cannot take a longer piece for one that it holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key(NonZeroU128);

impl Key {
    /// The key of `text[start..end]`, if it has one.
    #[inline]
    pub fn of(text: &[u8], start: usize, end: usize) -> Option<Self> {
        if end - start <= MAX_SHORT { NonZeroU128::new(pack(text, start, end)).map(Self) } else { None }
    }

    /// The integer; never zero.
    #[inline]
    pub fn get(self) -> u128 {
        self.0.get()
    }
}

/// The bytes in the low end, the length in the top byte; zero for no bytes.
#[inline]
fn pack(text: &[u8], start: usize, end: usize) -> u128 {
    let len = end - start;
    debug_assert!(len <= MAX_SHORT);
    // One load of 16 bytes and a mask, where the text goes on that far: it does but for the last piece or two.
    let window = text.get(start..start + 16).and_then(|window| <[u8; 16]>::try_from(window).ok());
    let bytes = if let Some(window) = window {
        u128::from_le_bytes(window) & ((1 << (8 * len)) - 1)
    } else {
        let mut window = [0; 16];
        window[..len].copy_from_slice(&text[start..end]);
        u128::from_le_bytes(window)
    };
    bytes | (len as u128) << 120
}

/// The bytes of a packed piece.
pub fn unpack(key: u128) -> ([u8; 16], usize) {
    (key.to_le_bytes(), (key >> 120) as usize)
}

/// A 64-bit hash of a key: both halves multiplied, the product folded (all input bits reach the low bits).
#[inline]
pub fn hash(key: u128) -> u64 {
    let low = key as u64 ^ 0x9E37_79B9_7F4A_7C15;
    let high = (key >> 64) as u64 ^ 0xD1B5_4A32_D192_ED03;
    let product = u128::from(low) * u128::from(high);
    (product as u64) ^ (product >> 64) as u64
}

/// A 64-bit hash of bytes of any length.
#[inline]
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    use std::hash::Hasher;
    let mut hasher = rustc_hash::FxHasher::default();
    hasher.write(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_the_same_at_the_end_of_a_text_and_inside_it() {
        let text = b"the quick brown fox jumps";
        for start in 0..text.len() {
            for end in start + 1..=text.len().min(start + MAX_SHORT) {
                let key = pack(text, start, end);
                assert_eq!(key, pack(&text[start..end], 0, end - start));
                let (bytes, len) = unpack(key);
                assert_eq!(&bytes[..len], &text[start..end]);
            }
        }
        assert_ne!(pack(b"a", 0, 1), pack(b"a\0", 0, 2));
    }

    #[test]
    fn no_bytes_and_too_many_have_no_key() {
        let text = [0; 40];
        for len in 0..=text.len() {
            assert_eq!(Key::of(&text, 0, len).is_some(), (1..=MAX_SHORT).contains(&len), "{len}");
        }
    }
}
