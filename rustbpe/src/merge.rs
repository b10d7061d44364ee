//! Merging the bytes of one piece to ids: always the adjacent pair of lowest id first, the leftmost of equals.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::encode::Check;
use crate::error::Result;
use crate::vocab::{NO_ID, Vocab};

/// Places looked at between two calls of `check`: some milliseconds.
const CHECK_EVERY: usize = 1 << 16;

/// Appends the ids of `piece` (not empty) to `out`.
///
/// # Errors
/// That of `check`, which a long piece asks every now and then.
pub fn merge_piece(vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>, check: Check) -> Result<()> {
    match piece.len() {
        ..=16 => merge_by_scan::<16>(vocab, piece, out),
        17..=64 => merge_by_scan::<64>(vocab, piece, out),
        _ if vocab.is_monotone() => merge_by_rounds(vocab, piece, out, check)?,
        _ => merge_by_heap(vocab, piece, out, check)?,
    }
    Ok(())
}

/// For up to `N` bytes, all on the stack: looks for the lowest pair each time, O(n^2) but within a few cache lines.
fn merge_by_scan<const N: usize>(vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
    let n = piece.len().min(N);
    let mut ids = [NO_ID; N];
    // made[i]: what the token that starts at byte i and its right neighbour merge into.
    let mut made = [NO_ID; N];
    let mut next = [0u8; N];
    let mut before = [0u8; N];
    for i in 0..n {
        ids[i] = vocab.byte_id(piece[i]);
        next[i] = i as u8 + 1;
        before[i] = (i as u8).wrapping_sub(1);
    }
    for i in 1..n {
        made[i - 1] = vocab.merged_bytes(piece[i - 1], piece[i]);
    }
    loop {
        let (mut at, mut lowest) = (0, NO_ID);
        for (i, &id) in made[..n].iter().enumerate() {
            if id < lowest {
                (at, lowest) = (i, id);
            }
        }
        if lowest == NO_ID {
            break;
        }
        let gone = usize::from(next[at]);
        let after = usize::from(next[gone]);
        ids[at] = lowest;
        ids[gone] = NO_ID;
        made[gone] = NO_ID;
        next[at] = after as u8;
        made[at] = NO_ID;
        if after < n {
            before[after] = at as u8;
            made[at] = vocab.merged(lowest, ids[after]);
        }
        if at > 0 {
            let left = usize::from(before[at]);
            made[left] = vocab.merged(ids[left], lowest);
        }
    }
    out.extend(ids[..n].iter().filter(|&&id| id != NO_ID));
}

/// Slots of the two long-piece algorithms: a token that spans slots `s..=e` has its id at both ends, so neighbours are
/// found from ids and lengths. Slot 0 and the last one are edges.
struct Slots<'a> {
    vocab: &'a Vocab,
    ids: Vec<u32>,
}

impl<'a> Slots<'a> {
    fn new(vocab: &'a Vocab, piece: &[u8]) -> Self {
        let mut ids = Vec::with_capacity(piece.len() + 2);
        ids.push(NO_ID);
        ids.extend(piece.iter().map(|&b| vocab.byte_id(b)));
        ids.push(NO_ID);
        Self { vocab, ids }
    }

    fn len_of(&self, id: u32) -> usize {
        self.vocab.token(id).len()
    }

    /// What the pair that starts at `start` merges into.
    fn made_at(&self, start: usize) -> u32 {
        let left = self.ids[start];
        let right = self.ids[start + self.len_of(left)];
        if right == NO_ID { NO_ID } else { self.vocab.merged(left, right) }
    }

    /// Merges the pair at `start` into `id`; returns where its left neighbour starts, if there is one.
    fn merge(&mut self, start: usize, id: u32) -> Option<usize> {
        let middle = start + self.len_of(self.ids[start]);
        let end = start + self.len_of(id);
        self.ids[middle - 1] = NO_ID;
        self.ids[middle] = NO_ID;
        self.ids[start] = id;
        self.ids[end - 1] = id;
        let before = self.ids[start - 1];
        (before != NO_ID).then(|| start - self.len_of(before))
    }

    fn emit(&self, out: &mut Vec<u32>) {
        let mut at = 1;
        while at + 1 < self.ids.len() {
            out.push(self.ids[at]);
            at += self.len_of(self.ids[at]);
        }
    }
}

/// For vocabularies in which every merge makes a larger id than its parts: ids rise from round to round, each round
/// merges all places of one id from left to right. O(n) places in all, plus a heap of the ids in play.
fn merge_by_rounds(vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>, check: Check) -> Result<()> {
    let mut slots = Slots::new(vocab, piece);
    let mut rounds = Rounds::default();
    for start in 1..piece.len() {
        rounds.add(slots.made_at(start), start);
    }
    while let Some(Reverse(id)) = rounds.ids.pop() {
        let places = rounds.places.remove(&id).unwrap_or_default();
        let (left, right) = vocab.parts(id);
        let left_len = vocab.token(left).len();
        for (i, start) in places.into_iter().enumerate() {
            if i % CHECK_EVERY == 0 {
                check()?;
            }
            let start = start as usize;
            if slots.ids[start] != left || slots.ids[start + left_len] != right {
                continue;
            }
            if let Some(before) = slots.merge(start, id) {
                rounds.add(slots.made_at(before), before);
            }
            rounds.add(slots.made_at(start), start);
        }
    }
    slots.emit(out);
    Ok(())
}

/// Places waiting for their round, by the id they make.
#[derive(Default)]
struct Rounds {
    ids: BinaryHeap<Reverse<u32>>,
    places: FxHashMap<u32, Vec<u32>>,
}

impl Rounds {
    fn add(&mut self, id: u32, start: usize) {
        if id != NO_ID {
            let places = self.places.entry(id).or_insert_with(|| {
                self.ids.push(Reverse(id));
                Vec::new()
            });
            places.push(start as u32);
        }
    }
}

/// For any vocabulary: a heap of (id made, place). O(n log n).
fn merge_by_heap(vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>, check: Check) -> Result<()> {
    let mut slots = Slots::new(vocab, piece);
    let candidate = |slots: &Slots, start: usize| {
        let id = slots.made_at(start);
        (id != NO_ID).then_some(Reverse((id, start)))
    };
    let mut heap: BinaryHeap<_> = (1..piece.len()).filter_map(|start| candidate(&slots, start)).collect();
    let mut looked = 0;
    while let Some(Reverse((id, start))) = heap.pop() {
        looked += 1;
        if looked % CHECK_EVERY == 0 {
            check()?;
        }
        let (left, right) = vocab.parts(id);
        if slots.ids[start] != left || slots.ids[start + vocab.token(left).len()] != right {
            continue;
        }
        let before = slots.merge(start, id);
        heap.extend(before.and_then(|before| candidate(&slots, before)));
        heap.extend(candidate(&slots, start));
    }
    slots.emit(out);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Vocabularies over `a`, `b`, `c` in which ranks are shuffled: most are not monotone.
    fn shuffled(order: &[usize]) -> Vocab {
        let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b]).collect();
        let words = ["ab", "abc", "bc", "aa", "aaa", "aaaa", "ca", "cab", "abab", "bb", "ba", "cc", "abcabc"];
        tokens.extend(order.iter().map(|&i| words[i].as_bytes().to_vec()));
        Vocab::from_tokens(&tokens).unwrap()
    }

    /// tiktoken's rule on bytes, written down directly.
    fn reference(vocab: &Vocab, piece: &[u8]) -> Vec<u32> {
        let mut parts: Vec<Vec<u8>> = piece.iter().map(|&b| vec![b]).collect();
        loop {
            let rank = |i: usize| {
                let both = [parts[i].as_slice(), &parts[i + 1]].concat();
                vocab.find(&both, 0, both.len()).unwrap_or(NO_ID)
            };
            match (0..parts.len() - 1).min_by_key(|&i| rank(i)).filter(|&i| rank(i) != NO_ID) {
                Some(i) => {
                    let right = parts.remove(i + 1);
                    parts[i].extend(right);
                }
                None => return parts.iter().map(|p| vocab.find(p, 0, p.len()).unwrap()).collect(),
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]
        #[test]
        fn every_algorithm_gives_what_the_rule_gives(
            order in Just((0..13).collect::<Vec<usize>>()).prop_shuffle(),
            piece in prop::collection::vec(97u8..100, 1..90),
        ) {
            let vocab = shuffled(&order);
            let expected = reference(&vocab, &piece);
            let mut scanned = Vec::new();
            merge_by_scan::<128>(&vocab, &piece, &mut scanned);
            if piece.len() <= 16 {
                let mut small = Vec::new();
                merge_by_scan::<16>(&vocab, &piece, &mut small);
                prop_assert_eq!(&small, &expected);
            }
            prop_assert_eq!(&scanned, &expected);
            let mut heaped = Vec::new();
            merge_by_heap(&vocab, &piece, &mut heaped, &mut || Ok(())).unwrap();
            prop_assert_eq!(&heaped, &expected);
            if vocab.is_monotone() {
                let mut rounds = Vec::new();
                merge_by_rounds(&vocab, &piece, &mut rounds, &mut || Ok(())).unwrap();
                prop_assert_eq!(&rounds, &expected);
            }
        }
    }

    #[test]
    fn rounds_equal_scanning_on_a_trained_vocabulary() {
        let merges = [(97, 97), (256, 256), (97, 98), (257, 257), (256, 97), (258, 258), (259, 258)];
        let vocab = Vocab::from_merges(&merges).unwrap();
        for n in 1..200 {
            let piece: Vec<u8> = (0..n).map(|i| if i % 17 == 16 { b'b' } else { b'a' }).collect();
            let (mut by_scan, mut by_rounds) = (Vec::new(), Vec::new());
            merge_by_scan::<255>(&vocab, &piece, &mut by_scan);
            merge_by_rounds(&vocab, &piece, &mut by_rounds, &mut || Ok(())).unwrap();
            assert_eq!(by_scan, by_rounds);
        }
    }
}
