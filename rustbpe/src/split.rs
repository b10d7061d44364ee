//! Pre-tokenization: text to pieces, exactly as the pattern's regex would find them.
//!
//! The two families of patterns in use (GPT-2's and GPT-4's) are matched by hand, one look at each character and no
//! backtracking: linear on any input; where text is ASCII, GPT-4's goes 64 bytes at a time. Every other pattern runs on
//! `fancy-regex`.

use fancy_regex::Regex;

use crate::classes::{Classes, LETTER, NEWLINE, NUMBER, OTHER, SPACE, classes};
use crate::error::{Error, Result};
use crate::window::{Starts, WINDOW, starts};

/// GPT-4's pattern in the form the `rustbpe` package of `PyPI` uses when none is given.
pub const GPT4_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
);

/// Spellings of the GPT-4 family, `DIGITS` standing for `{1,n}`; the flag says whether white space that ends the text
/// is one piece even if it holds a newline (`\s++$` first).
const GPT4_FAMILY: [(&str, bool); 3] = [
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        false,
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        false,
    ),
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}DIGITS+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        true,
    ),
];

const GPT2_FAMILY: [&str; 3] = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
];

/// A compiled pattern.
pub struct Splitter {
    pattern: String,
    kind: Kind,
}

enum Kind {
    Gpt2,
    Gpt4 { max_digits: usize, whole_tail: bool },
    Regex(Box<Regex>),
}

impl Splitter {
    /// Compiles `pattern`; a hand-written matcher is chosen where the pattern is one of the known spellings.
    pub fn new(pattern: &str) -> Result<Self> {
        let kind = match known(pattern) {
            Some(kind) => kind,
            None => Kind::Regex(Box::new(
                Regex::new(pattern)
                    .map_err(|e| Error::invalid(format!("pattern {pattern:?} does not compile: {e}")))?,
            )),
        };
        Ok(Self { pattern: pattern.to_owned(), kind })
    }

    /// The pattern as it was given.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `piece(text, start, end)` for each piece in order. O(length) for the known patterns.
    ///
    /// # Errors
    /// That of `piece`, which ends it; and with a pattern of the caller's own, when the regex engine gives up (its
    /// backtracking limit).
    #[inline]
    pub fn for_each(&self, text: &str, mut piece: impl FnMut(&[u8], usize, usize) -> Result<()>) -> Result<()> {
        let bytes = text.as_bytes();
        let classes = classes();
        let mut at = 0;
        match &self.kind {
            Kind::Gpt2 => {
                while at < bytes.len() {
                    let end = next_gpt2(classes, bytes, at);
                    piece(bytes, at, end)?;
                    at = end;
                }
            }
            Kind::Gpt4 { max_digits, whole_tail } => {
                while at < bytes.len() {
                    if let Some(window) = ascii_window(bytes, at) {
                        let Starts { at: mut starts, cut } = starts(window, *max_digits);
                        let (base, any) = (at, starts != 0);
                        while starts != 0 {
                            let end = base + starts.trailing_zeros() as usize;
                            piece(bytes, at, end)?;
                            at = end;
                            starts &= starts - 1;
                        }
                        if any && !cut {
                            continue;
                        }
                    }
                    let end = next_gpt4(classes, bytes, at, *max_digits, *whole_tail);
                    piece(bytes, at, end)?;
                    at = end;
                }
            }
            Kind::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|e| {
                        Error::invalid(format!(
                            "pattern {:?} failed on a text of {} bytes: {e}",
                            self.pattern,
                            text.len()
                        ))
                    })?;
                    if !found.as_str().is_empty() {
                        piece(bytes, found.start(), found.end())?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn known(pattern: &str) -> Option<Kind> {
    if GPT2_FAMILY.contains(&pattern) {
        return Some(Kind::Gpt2);
    }
    (1..=9).find_map(|max_digits| {
        let digits = format!("{{1,{max_digits}}}");
        GPT4_FAMILY
            .iter()
            .find(|(spelling, _)| spelling.replace("DIGITS", &digits) == pattern)
            .map(|&(_, whole_tail)| Kind::Gpt4 { max_digits, whole_tail })
    })
}

/// The next bytes, if there are enough and they begin with ASCII.
#[inline]
fn ascii_window(text: &[u8], at: usize) -> Option<&[u8; WINDOW]> {
    let window = text.get(at..at + WINDOW)?.first_chunk::<WINDOW>()?;
    (window[0] | window[1]).is_ascii().then_some(window)
}

/// End of the run of characters of `class` that starts at `at`.
#[inline]
fn run(classes: &Classes, text: &[u8], mut at: usize, class: u8) -> usize {
    while at < text.len() {
        let (found, width) = classes.at(text, at);
        if found != class {
            break;
        }
        at += width;
    }
    at
}

/// [`run`] for letters, eight bytes a step: most words end within the first, and where they do is found without a
/// branch that a processor would have to guess.
#[inline]
fn letters(classes: &Classes, text: &[u8], mut at: usize) -> usize {
    while let Some(window) = text.get(at..at + 8).and_then(|window| <[u8; 8]>::try_from(window).ok()) {
        let ascii = leading_letters(u64::from_le_bytes(window));
        at += ascii;
        if ascii < 8 {
            return if window[ascii] < 0x80 { at } else { run(classes, text, at, LETTER) };
        }
    }
    run(classes, text, at, LETTER)
}

/// How many of eight bytes, from the lowest, are ASCII letters before one that is not.
#[inline]
fn leading_letters(bytes: u64) -> usize {
    const HIGH: u64 = 0x8080_8080_8080_8080;
    let each = |byte: u8| u64::from_ne_bytes([byte; 8]);
    // With bit 5 set and bit 7 clear a letter is in a..=z; adding carries into bit 7 from `a` on, and from `z + 1` on.
    let folded = (bytes | each(0x20)) & !HIGH;
    let from_a = folded + each(0x80 - b'a');
    let beyond_z = folded + each(0x80 - b'z' - 1);
    let letters = from_a & !beyond_z & !bytes & HIGH;
    ((letters ^ HIGH).trailing_zeros() / 8) as usize
}

/// Class of the character at `at`, or `NEWLINE` past the end: a class that continues no piece there.
#[inline]
fn class_at(classes: &Classes, text: &[u8], at: usize) -> u8 {
    if at < text.len() { classes.at(text, at).0 } else { NEWLINE }
}

/// Length of `'s`, `'d`, `'m`, `'t`, `'ll`, `'ve`, `'re` at the apostrophe `at`, or 0. Without case it also takes
/// U+017F, the long s, which folds to `s`.
#[inline]
fn contraction(text: &[u8], at: usize, ignore_case: bool) -> usize {
    let fold = |b: u8| if ignore_case { b.to_ascii_lowercase() } else { b };
    match (text.get(at + 1).map(|&b| fold(b)), text.get(at + 2).map(|&b| fold(b))) {
        (Some(b's' | b'd' | b'm' | b't'), _) => 2,
        (Some(b'l'), Some(b'l')) | (Some(b'v' | b'r'), Some(b'e')) => 3,
        (Some(0xC5), Some(0xBF)) if ignore_case => 3,
        _ => 0,
    }
}

#[inline]
fn next_gpt2(classes: &Classes, text: &[u8], at: usize) -> usize {
    let (class, width) = classes.at(text, at);
    match class {
        LETTER | NUMBER => run(classes, text, at + width, class),
        OTHER => {
            if text[at] == b'\'' {
                let taken = contraction(text, at, false);
                if taken > 0 {
                    return at + taken;
                }
            }
            run(classes, text, at + width, OTHER)
        }
        _ => {
            if text[at] == b' ' {
                let next = class_at(classes, text, at + 1);
                if next <= NUMBER {
                    return run(classes, text, at + 1, next);
                }
            }
            white_space(classes, text, at).without_last(text)
        }
    }
}

#[inline]
fn next_gpt4(classes: &Classes, text: &[u8], at: usize, max_digits: usize, whole_tail: bool) -> usize {
    let (class, width) = classes.at(text, at);
    match class {
        LETTER => letters(classes, text, at + width),
        NUMBER => digits(classes, text, at + width, max_digits - 1),
        OTHER => {
            if text[at] == b'\'' {
                let taken = contraction(text, at, true);
                if taken > 0 {
                    return at + taken;
                }
            }
            if class_at(classes, text, at + width) == LETTER {
                return letters(classes, text, at + width);
            }
            newlines(text, run(classes, text, at + width, OTHER))
        }
        _ => {
            if class == SPACE {
                let next = class_at(classes, text, at + width);
                if next == LETTER {
                    return letters(classes, text, at + width);
                }
                if next == OTHER && text[at] == b' ' {
                    return newlines(text, run(classes, text, at + 1, OTHER));
                }
            }
            let space = white_space(classes, text, at);
            if space.after_newline > 0 && !(whole_tail && space.end == text.len()) {
                return space.after_newline;
            }
            space.without_last(text)
        }
    }
}

fn digits(classes: &Classes, text: &[u8], mut at: usize, mut left: usize) -> usize {
    while left > 0 && at < text.len() {
        let (class, width) = classes.at(text, at);
        if class != NUMBER {
            break;
        }
        at += width;
        left -= 1;
    }
    at
}

#[inline]
fn newlines(text: &[u8], mut at: usize) -> usize {
    while at < text.len() && matches!(text[at], b'\r' | b'\n') {
        at += 1;
    }
    at
}

/// A run of white space: where it ends, where its last character starts and where its last newline ends.
struct WhiteSpace {
    start: usize,
    last: usize,
    end: usize,
    after_newline: usize,
}

fn white_space(classes: &Classes, text: &[u8], start: usize) -> WhiteSpace {
    let mut space = WhiteSpace { start, last: start, end: start, after_newline: 0 };
    while space.end < text.len() {
        let (class, width) = classes.at(text, space.end);
        if class < SPACE {
            break;
        }
        space.last = space.end;
        space.end += width;
        if class == NEWLINE {
            space.after_newline = space.end;
        }
    }
    space
}

impl WhiteSpace {
    /// `\s+(?!\S)|\s+`: all of it at the end of the text, else without its last character if there are others.
    fn without_last(&self, text: &[u8]) -> usize {
        if self.end == text.len() || self.last == self.start { self.end } else { self.last }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    fn patterns() -> Vec<String> {
        let mut all: Vec<String> = GPT2_FAMILY.iter().map(ToString::to_string).collect();
        for (spelling, _) in GPT4_FAMILY {
            all.extend(["{1,1}", "{1,2}", "{1,3}"].map(|digits| spelling.replace("DIGITS", digits)));
        }
        all
    }

    fn pieces(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut all = Vec::new();
        let push = |_: &[u8], start, end| {
            all.push(text[start..end].to_owned());
            Ok(())
        };
        splitter.for_each(text, push).unwrap();
        all
    }

    /// Each known pattern matched by hand and by the regex engine.
    fn check(text: &str) {
        static BOTH: LazyLock<Vec<(Splitter, Regex)>> =
            LazyLock::new(|| patterns().iter().map(|p| (Splitter::new(p).unwrap(), Regex::new(p).unwrap())).collect());
        for (ours, regex) in BOTH.iter() {
            assert!(!matches!(ours.kind, Kind::Regex(_)), "{} must be matched by hand", ours.pattern);
            let expected: Vec<&str> = regex.find_iter(text).map(|m| m.unwrap().as_str()).collect();
            assert_eq!(pieces(ours, text), expected, "{} on {text:?}", ours.pattern);
        }
    }

    #[test]
    fn every_short_string_over_one_of_each_kind_splits_as_the_regex_does() {
        let alphabet = ["a", "\u{e9}", "1", "\u{b2}", " ", "\u{3000}", "\n", "\r", ".", "'", "s", "\u{301}"];
        let mut all = vec![String::new()];
        for _ in 0..4 {
            let longer: Vec<String> =
                all.iter().flat_map(|s| alphabet.iter().map(move |c| format!("{s}{c}"))).collect();
            all = longer;
            check(&all.join("\u{1}"));
            for text in &all {
                check(text);
            }
        }
    }

    #[test]
    fn eight_bytes_at_once_are_letters_as_each_alone() {
        for byte in 0..=255u8 {
            for before in 0..8 {
                let mut window = [b'q'; 8];
                window[before] = byte;
                let expected = if byte.is_ascii_alphabetic() { 8 } else { before };
                assert_eq!(leading_letters(u64::from_le_bytes(window)), expected, "{byte:#x} at {before}");
            }
        }
    }

    #[test]
    fn contractions_fold_case_as_the_regex_does() {
        for c in (0..0x11_0000).filter_map(char::from_u32).filter(|c| c.is_alphabetic()) {
            if c.is_ascii() || c.to_lowercase().any(|l| l.is_ascii()) || c.to_uppercase().any(|u| u.is_ascii()) {
                check(&format!("x'{c}l'l{c}'{c}e 'v{c}"));
            }
        }
    }

    #[test]
    fn any_other_pattern_falls_back_to_the_regex_engine() {
        let splitter = Splitter::new(r"[a-z]+|\d").unwrap();
        assert_eq!(pieces(&splitter, "ab1 2c!"), ["ab", "1", "2", "c"]);
        assert!(matches!(Splitter::new("("), Err(Error::Invalid(message)) if message.contains("does not compile")));
    }

    #[test]
    fn windows_of_ascii_split_as_the_regex_does() {
        let kinds =
            ["a", "Zs", "1", "23", " ", "  ", "\n", "\r\n", ".", "--", "'", "'s", "'LL", " the", "\t", "\u{e9}", "\0"];
        let mut state = 1u64;
        let mut any = |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % n
        };
        for _ in 0..3000 {
            // Few kinds a text, so that runs and rare neighbours come up, and of all lengths around a window.
            let some: Vec<&str> = (0..=any(6)).map(|_| kinds[any(kinds.len())]).collect();
            check(&(0..20 + any(150)).map(|_| some[any(some.len())]).collect::<String>());
        }
        let alphabet = ["a", "1", " ", "\n", ".", "'s", "\t"];
        let mut all = vec![String::new()];
        for _ in 0..5 {
            all = all.iter().flat_map(|s| alphabet.iter().map(move |c| format!("{s}{c}"))).collect();
        }
        for text in all {
            // At the start of a window, and over its end.
            check(&format!("{text}{}", "q".repeat(64)));
            check(&format!("{}{text}{}", "q ".repeat(31), ";".repeat(70)));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn random_unicode_splits_as_the_regex_does(text in "([a-zA-Z']|[ \\n\\r\\t]|\\PC|\\p{Zs}|\\p{N}|\\p{M}|\\p{Cc}|'(?i:ll|ve|re|s)){0,40}") {
            check(&text);
        }
    }
}
