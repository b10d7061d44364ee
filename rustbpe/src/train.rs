//! Merging: from counted pieces to the list of merges.
//!
//! All pieces lie end to end in one array with a slot per byte. A token that spans slots `s..=e` has its id at both
//! ends, so the neighbours of any position are found from the ids beside it and their lengths: no links. Every pair
//! knows the places where it was born; merging it visits only those, and a place that an earlier merge consumed no
//! longer reads as the pair and is passed over. Each byte boundary is merged away at most once, so all merges together
//! touch O(bytes of distinct pieces) places; the heap adds O(pairs log pairs).
//!
//! Order: the pair with the highest count, ties by the smaller pair of ids. Nothing depends on the order of the pieces,
//! hence not on hash tables or threads.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::count::Words;
use crate::error::{Error, Result};

/// Beside the first and the last token of a piece.
const EDGE: u32 = u32::MAX;
/// Inside a token of three bytes and more.
const HOLE: u32 = u32::MAX - 1;
/// The pair was not born after all.
const NONE: usize = usize::MAX;

/// Merges between two calls of the progress callback: well under a second even at the start.
const PROGRESS_EVERY: usize = 16;

/// A pair of adjacent tokens: its present count, and its places when it was born.
struct Pair {
    left: u32,
    right: u32,
    count: u64,
    first_place: usize,
    places: u32,
}

/// A pair in the heap, with the count it had when it was put there (never less than its present one).
#[derive(PartialEq, Eq)]
struct Candidate {
    count: u64,
    left: u32,
    right: u32,
    pair: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |c: &Self| (c.count, Reverse((c.left, c.right)));
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Finds up to `merges` merges; token `256 + i` is the i-th pair. Fewer are returned if no pair is left.
///
/// `progress(merges done)` is called regularly.
///
/// # Errors
/// More than 4 GiB of distinct pieces; or the error of `progress`.
pub fn train(words: Words, merges: usize, mut progress: impl FnMut(usize) -> Result<()>) -> Result<Vec<(u32, u32)>> {
    let mut state = Trainer::new(&words)?;
    drop(words);
    let mut done = Vec::with_capacity(merges.min(1 << 20));
    while done.len() < merges {
        if done.len().is_multiple_of(PROGRESS_EVERY) {
            progress(done.len())?;
        }
        let Some(pair) = state.best() else { break };
        done.push(state.merge(pair));
    }
    Ok(done)
}

struct Trainer {
    /// A slot per byte of the pieces and an `EDGE` around each.
    slots: Vec<u32>,
    /// Bytes of each token.
    len: Vec<u32>,
    /// Runs of pieces of equal count: first slot and count. The last is a sentinel past the end.
    runs: Vec<(u32, u64)>,
    /// Places of all pairs, each pair's rising.
    places: Vec<u32>,
    pairs: Vec<Pair>,
    pair_of: FxHashMap<u64, u32>,
    heap: BinaryHeap<Candidate>,
    fresh: Fresh,
}

/// The pairs one merge gives birth to, by neighbour: key `2 * id` for a left neighbour, `2 * id + 1` for a right one.
#[derive(Default)]
struct Fresh {
    /// Count of each neighbour's pair.
    count: Vec<u64>,
    /// Places of each neighbour's pair.
    places: Vec<u32>,
    /// Where each neighbour's next place goes in the arena.
    cursor: Vec<usize>,
    /// Keys seen, in order.
    keys: Vec<u32>,
    /// (key, place) in order of places.
    events: Vec<(u32, u32)>,
}

impl Fresh {
    fn grow(&mut self, tokens: usize) {
        self.count.resize(2 * tokens, 0);
        self.places.resize(2 * tokens, 0);
        self.cursor.resize(2 * tokens, NONE);
    }

    #[inline]
    fn add(&mut self, key: u32, place: u32, count: u64) {
        let i = key as usize;
        if self.places[i] == 0 {
            self.keys.push(key);
        }
        self.places[i] += 1;
        self.count[i] += count;
        self.events.push((key, place));
    }
}

fn pair_key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl Trainer {
    fn new(words: &Words) -> Result<Self> {
        let size = words.bytes.len() + words.ends.len() + 1;
        if size >= HOLE as usize {
            return Err(Error::invalid(format!(
                "the distinct pieces take {} bytes, more than the 4 GiB one training can hold; give it less text",
                words.bytes.len()
            )));
        }
        let mut slots = Vec::with_capacity(size);
        let mut runs: Vec<(u32, u64)> = Vec::new();
        slots.push(EDGE);
        let mut start = 0;
        for (&end, &count) in words.ends.iter().zip(&words.counts) {
            if runs.last().is_none_or(|&(_, last)| last != count) {
                runs.push((slots.len() as u32, count));
            }
            slots.extend(words.bytes[start..end].iter().map(|&b| u32::from(b)));
            slots.push(EDGE);
            start = end;
        }
        runs.push((u32::MAX, 0));
        let mut trainer = Self {
            slots,
            len: vec![1; 256],
            runs,
            places: Vec::new(),
            pairs: Vec::new(),
            pair_of: FxHashMap::default(),
            heap: BinaryHeap::new(),
            fresh: Fresh::default(),
        };
        trainer.count_byte_pairs();
        Ok(trainer)
    }

    /// Fills in the pairs of bytes: two passes, counts and then places.
    fn count_byte_pairs(&mut self) {
        let mut counts = vec![0u64; 1 << 16];
        let mut places = vec![0u32; 1 << 16];
        let byte_pair = |w: &[u32]| (w[0] < 256 && w[1] < 256).then(|| (w[0] << 8 | w[1]) as usize);
        for run in self.runs.windows(2) {
            let end = (run[1].0 as usize).min(self.slots.len());
            for window in self.slots[run[0].0 as usize..end].windows(2) {
                if let Some(i) = byte_pair(window) {
                    counts[i] += run[0].1;
                    places[i] += 1;
                }
            }
        }
        let mut cursors = vec![0usize; 1 << 16];
        let mut total = 0;
        for i in 0..1 << 16 {
            cursors[i] = total;
            if places[i] > 0 {
                self.add_pair(i as u32 >> 8, i as u32 & 0xFF, counts[i], total, places[i]);
            }
            total += places[i] as usize;
        }
        self.places = vec![0; total];
        for (place, window) in self.slots.windows(2).enumerate() {
            if let Some(i) = byte_pair(window) {
                self.places[cursors[i]] = place as u32;
                cursors[i] += 1;
            }
        }
    }

    fn add_pair(&mut self, left: u32, right: u32, count: u64, first_place: usize, places: u32) {
        let pair = self.pairs.len() as u32;
        self.pairs.push(Pair { left, right, count, first_place, places });
        self.pair_of.insert(pair_key(left, right), pair);
        self.heap.push(Candidate { count, left, right, pair });
    }

    /// The pair to merge next. Counts only fall after birth, so a candidate whose count is still true is the best.
    fn best(&mut self) -> Option<u32> {
        while let Some(mut top) = self.heap.pop() {
            let count = self.pairs[top.pair as usize].count;
            if count == top.count {
                return Some(top.pair);
            }
            if count > 0 {
                top.count = count;
                self.heap.push(top);
            }
        }
        None
    }

    /// Merges `pair` everywhere and returns it.
    fn merge(&mut self, pair: u32) -> (u32, u32) {
        let Pair { left: a, right: b, first_place, places, .. } = self.pairs[pair as usize];
        self.pair_of.remove(&pair_key(a, b));
        self.pairs[pair as usize].count = 0;
        let merged = self.len.len() as u32;
        self.len.push(self.len[a as usize] + self.len[b as usize]);
        self.fresh.grow(self.len.len());
        let mut run = 0;
        for i in first_place..first_place + places as usize {
            let place = self.places[i];
            // Places rise, so the run is found by walking on, with strides that double: most steps stay in the run.
            run += run_ahead(&self.runs[run..], place);
            self.merge_at(place, a, b, merged, self.runs[run].1);
        }
        self.settle(a, b, merged);
        (a, b)
    }

    /// Replaces `a b` at `place`, if it is still there, and notes the neighbours.
    #[inline]
    fn merge_at(&mut self, place: u32, a: u32, b: u32, merged: u32, count: u64) {
        let (start, a_len) = (place as usize, self.len[a as usize] as usize);
        let middle = start + a_len;
        if self.slots[start] != a || self.slots[middle] != b {
            return;
        }
        let end = middle + self.len[b as usize] as usize;
        self.slots[middle - 1] = HOLE;
        self.slots[middle] = HOLE;
        self.slots[start] = merged;
        self.slots[end - 1] = merged;
        let before = self.slots[start - 1];
        if before != EDGE {
            self.fresh.add(2 * before, place - self.len[before as usize], count);
        }
        let after = self.slots[end];
        if after != EDGE {
            self.fresh.add(2 * after + 1, place, count);
        }
    }

    /// Books what the merge changed: every pair with `a` on its right or `b` on its left lost what the new pair with
    /// the same neighbour has gained.
    fn settle(&mut self, a: u32, b: u32, merged: u32) {
        let mut fresh = std::mem::take(&mut self.fresh);
        let first = self.places.len();
        let mut next = first;
        // In a run like `a b a b`, the right neighbour of the first merge is itself merged next: `merged a` is born
        // and gone within this step.
        let passing = fresh.count[2 * merged as usize];
        for &key in &fresh.keys {
            let i = key as usize;
            let (neighbour, count) = (key >> 1, fresh.count[i]);
            let (old, new) = if key & 1 == 0 {
                ((neighbour, a), (neighbour, merged))
            } else {
                ((b, neighbour), (merged, neighbour))
            };
            if let Some(&old) = self.pair_of.get(&pair_key(old.0, old.1)).filter(|_| key != 2 * merged) {
                self.pairs[old as usize].count -= count;
            }
            let left = if new == (merged, a) { count - passing } else { count };
            fresh.cursor[i] = if left > 0 { next } else { NONE };
            if left > 0 {
                self.add_pair(new.0, new.1, left, next, fresh.places[i]);
                next += fresh.places[i] as usize;
            }
        }
        self.places.resize(next, 0);
        for &(key, place) in &fresh.events {
            let cursor = &mut fresh.cursor[key as usize];
            if *cursor != NONE {
                self.places[*cursor] = place;
                *cursor += 1;
            }
        }
        for &key in &fresh.keys {
            fresh.places[key as usize] = 0;
            fresh.count[key as usize] = 0;
        }
        fresh.keys.clear();
        fresh.events.clear();
        self.fresh = fresh;
    }
}

/// How many runs to walk on from the first so that the slot `place` lies in it. O(log of the answer).
#[inline]
fn run_ahead(runs: &[(u32, u64)], place: u32) -> usize {
    let mut reach = 1;
    while reach < runs.len() && runs[reach].0 <= place {
        reach *= 2;
    }
    let from = reach / 2;
    from + runs[from + 1..runs.len().min(reach + 1)].partition_point(|run| run.0 <= place)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Counts everything anew for every merge.
    fn naive(words: &[(Vec<u8>, u64)], merges: usize) -> Vec<(u32, u32)> {
        let mut words: Vec<(Vec<u32>, u64)> =
            words.iter().map(|(w, c)| (w.iter().map(|&b| u32::from(b)).collect(), *c)).collect();
        let mut done = Vec::new();
        while done.len() < merges {
            let mut counts: BTreeMap<(u32, u32), u64> = BTreeMap::new();
            for (word, count) in &words {
                for pair in word.windows(2) {
                    *counts.entry((pair[0], pair[1])).or_default() += count;
                }
            }
            let Some((&pair, _)) = counts.iter().max_by_key(|&(&pair, &count)| (count, Reverse(pair))) else { break };
            let id = 256 + done.len() as u32;
            for (word, _) in &mut words {
                let mut i = 0;
                while i + 1 < word.len() {
                    if (word[i], word[i + 1]) == pair {
                        word.splice(i..i + 2, [id]);
                    }
                    i += 1;
                }
            }
            done.push(pair);
        }
        done
    }

    fn as_words(words: &[(Vec<u8>, u64)]) -> Words {
        let mut sorted = words.to_vec();
        sorted.sort_by_key(|&(_, count)| Reverse(count));
        let mut all = Words::default();
        for (word, count) in &sorted {
            all.push(word, *count);
        }
        all
    }

    #[test]
    fn runs_of_one_character_merge_from_the_left() {
        for n in 2..70 {
            let words = vec![(vec![b'a'; n], 3), (b"ba".to_vec(), 2)];
            assert_eq!(train(as_words(&words), 40, |_| Ok(())).unwrap(), naive(&words, 40), "{n}");
        }
    }

    #[test]
    fn counts_beyond_32_bits_are_exact() {
        let words = vec![(b"ab".to_vec(), u64::from(u32::MAX) * 4 + 1), (b"cd".to_vec(), u64::from(u32::MAX) * 4 + 2)];
        assert_eq!(train(as_words(&words), 2, |_| Ok(())).unwrap(), [(99, 100), (97, 98)]);
    }

    #[test]
    fn no_pieces_give_no_merges_and_progress_can_stop_it() {
        assert_eq!(train(Words::default(), 10, |_| Ok(())).unwrap(), []);
        assert_eq!(train(Words::default(), 10, |_| Err(Error::Interrupted)), Err(Error::Interrupted));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn merges_equal_those_of_counting_anew(
            words in prop::collection::vec((prop::collection::vec(97u8..101, 1..14), 1u64..5), 1..20),
            merges in 0usize..60,
        ) {
            prop_assert_eq!(train(as_words(&words), merges, |_| Ok(())).unwrap(), naive(&words, merges));
        }
    }
}
