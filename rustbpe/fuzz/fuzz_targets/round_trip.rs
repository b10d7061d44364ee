//! Any vocabulary and any text: what is encoded decodes to the text, on one thread and on three, whatever the pattern.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustbpe::encode::Encoder;
use rustbpe::split::{GPT4_PATTERN, Splitter};
use rustbpe::vocab::Vocab;

const PATTERNS: [&str; 3] =
    [GPT4_PATTERN, r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", r"(?s).+"];

#[derive(Debug, Arbitrary)]
struct Input {
    pattern: u8,
    tokens: Vec<Vec<u8>>,
    text: String,
}

fuzz_target!(|input: Input| {
    let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
    tokens.extend(input.tokens.into_iter().take(300).map(|mut token| {
        token.truncate(40);
        token
    }));
    // Empty and repeated tokens are errors, and no more than that.
    let Ok(vocab) = Vocab::from_tokens(&tokens) else { return };
    let pattern = PATTERNS[usize::from(input.pattern) % PATTERNS.len()];
    let encoder = Encoder::new(vocab, Splitter::new(pattern).expect("the patterns compile"));
    let ids = encoder.encode(&input.text).expect("no pattern here gives up");
    let bytes = encoder.vocab().decode(ids.iter().copied()).expect("these ids are of the vocabulary");
    assert_eq!(bytes, input.text.as_bytes());
    let texts = [input.text.as_str(); 3];
    let (flat, offsets) = encoder.encode_batch(&texts, 3).expect("as before");
    assert_eq!(flat, [&ids[..]; 3].concat());
    assert_eq!(offsets, [0, ids.len(), 2 * ids.len(), 3 * ids.len()]);
});
