//! Character classes of the split patterns: `\p{L}`, `\p{N}`, `\s`, newline, everything else.
//!
//! The tables are built once from `regex-syntax`, the same source of Unicode data the regex crates compile their
//! classes from, so the hand-written splitter and a regex cannot disagree about a character.

use std::sync::OnceLock;

use regex_syntax::hir::{Class as HirClass, HirKind};

/// Neither letter, number nor white space: `[^\s\p{L}\p{N}]`.
pub const OTHER: u8 = 0;
/// `\p{L}`.
pub const LETTER: u8 = 1;
/// `\p{N}`.
pub const NUMBER: u8 = 2;
/// `\s` without carriage return and line feed.
pub const SPACE: u8 = 3;
/// Carriage return or line feed.
pub const NEWLINE: u8 = 4;

const BLOCK: usize = 256;

/// Class of every code point: one flat table for ASCII, two levels for the rest (about 60 KB in all).
pub struct Classes {
    ascii: [u8; 128],
    block_of: Vec<u16>,
    blocks: Vec<u8>,
}

/// The process-wide table; the first call builds it (about a millisecond).
pub fn classes() -> &'static Classes {
    static TABLE: OnceLock<Classes> = OnceLock::new();
    TABLE.get_or_init(Classes::build)
}

impl Classes {
    fn build() -> Self {
        let mut flat = vec![OTHER; 0x11_0000];
        for (pattern, class) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE), (r"[\r\n]", NEWLINE)] {
            for (first, last) in ranges(pattern) {
                flat[first as usize..=last as usize].fill(class);
            }
        }
        let mut ascii = [OTHER; 128];
        ascii.copy_from_slice(&flat[..128]);
        let (mut block_of, mut blocks) = (Vec::new(), Vec::<u8>::new());
        for chunk in flat.chunks(BLOCK) {
            let known = blocks.chunks(BLOCK).position(|block| block == chunk);
            block_of.push(known.unwrap_or(blocks.len() / BLOCK) as u16);
            if known.is_none() {
                blocks.extend_from_slice(chunk);
            }
        }
        Self { ascii, block_of, blocks }
    }

    /// Class and width in bytes of the character that starts at `at` in valid UTF-8 `text`.
    #[inline]
    pub fn at(&self, text: &[u8], at: usize) -> (u8, usize) {
        let first = text[at];
        if first < 0x80 { (self.ascii[first as usize], 1) } else { self.wide(text, at) }
    }

    /// [`Classes::at`] for a lead byte of two, three or four bytes.
    #[inline(never)]
    fn wide(&self, text: &[u8], at: usize) -> (u8, usize) {
        let first = u32::from(text[at]);
        let tail = |i: usize| u32::from(text[at + i] & 0x3F);
        let (code, width) = if first < 0xE0 {
            ((first & 0x1F) << 6 | tail(1), 2)
        } else if first < 0xF0 {
            ((first & 0x0F) << 12 | tail(1) << 6 | tail(2), 3)
        } else {
            ((first & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4)
        };
        let block = self.block_of[code as usize / BLOCK] as usize;
        (self.blocks[block * BLOCK + code as usize % BLOCK], width)
    }
}

/// Inclusive code point ranges of a class, as the regex crates see it.
fn ranges(pattern: &str) -> Vec<(u32, u32)> {
    let hir = regex_syntax::parse(pattern).expect("the four class patterns are constants that parse");
    match hir.kind() {
        HirKind::Class(HirClass::Unicode(class)) => {
            class.iter().map(|range| (range.start() as u32, range.end() as u32)).collect()
        }
        kind => unreachable!("{pattern} is a Unicode class, not {kind:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_point_has_the_class_a_regex_gives_it() {
        let classes = classes();
        let regexes: Vec<_> = [(r"^[\r\n]$", NEWLINE), (r"^\p{L}$", LETTER), (r"^\p{N}$", NUMBER), (r"^\s$", SPACE)]
            .into_iter()
            .map(|(pattern, class)| (fancy_regex::Regex::new(pattern).unwrap(), class))
            .collect();
        for c in (0..0x11_0000).filter_map(char::from_u32) {
            let text = c.to_string();
            let expected = regexes.iter().find(|(r, _)| r.is_match(&text).unwrap()).map_or(OTHER, |(_, class)| *class);
            assert_eq!(classes.at(text.as_bytes(), 0), (expected, text.len()), "{:x}", c as u32);
        }
    }
}
