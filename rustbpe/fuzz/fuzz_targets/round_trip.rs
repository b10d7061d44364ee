//! Any vocabulary and any text: the ids are those of tiktoken's rule, cold and warm, on one thread and on three, and
//! decode to the text. Half of the texts are tokens. (`dev/fuzz_ids.py` asks tiktoken itself.)

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
    /// Which token is the text, if it is one.
    token: Option<u16>,
}

/// The rule written down: a piece that is a token is that token; else the pair whose bytes have the lowest rank merges.
fn by_the_rule(vocab: &Vocab, piece: &[u8]) -> Vec<u32> {
    let id = |start: usize, end: usize| vocab.find(piece, start, end);
    if let Some(id) = id(0, piece.len()) {
        return vec![id];
    }
    let mut ends: Vec<usize> = (0..=piece.len()).collect();
    let lowest = |ends: &[usize]| (1..ends.len() - 1).filter_map(|i| Some((id(ends[i - 1], ends[i + 1])?, i))).min();
    while let Some((_, i)) = lowest(&ends) {
        ends.remove(i);
    }
    ends.windows(2).map(|w| id(w[0], w[1]).expect("every byte is a token")).collect()
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
    let own = input.token.map(|i| tokens[usize::from(i) % tokens.len()].clone());
    let text = own.and_then(|token| String::from_utf8(token).ok()).unwrap_or(input.text);
    let mut expected = Vec::new();
    let add = |bytes: &[u8], start: usize, end: usize| {
        expected.extend(by_the_rule(encoder.vocab(), &bytes[start..end]));
        Ok(())
    };
    encoder.splitter().for_each(&text, add).expect("no pattern here gives up");
    let ids = encoder.encode(&text).expect("as before");
    assert_eq!(ids, expected);
    assert_eq!(encoder.encode(&text).expect("as before"), expected);
    let bytes = encoder.vocab().decode(ids.iter().copied()).expect("these ids are of the vocabulary");
    assert_eq!(bytes, text.as_bytes());
    let texts = [text.as_str(); 3];
    let (flat, offsets) = encoder.encode_batch(&texts, 3).expect("as before");
    assert_eq!(flat, [&ids[..]; 3].concat());
    assert_eq!(offsets, [0, ids.len(), 2 * ids.len(), 3 * ids.len()]);
});
