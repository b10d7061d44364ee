//! Counting pieces: how often each distinct piece occurs.
//!
//! What stays of a text is one entry per distinct piece. Time O(bytes), memory O(distinct pieces). Counts are 64-bit.

use hashbrown::HashTable;
use rustc_hash::FxHashMap;

use crate::error::Result;
use crate::key::{Key, hash, hash_bytes, unpack};
use crate::split::Splitter;

/// Pieces counted together.
const BATCH: usize = 64;

/// What a distinct piece costs from counting to the last merge, at most: bytes for the piece itself, and for each of its
/// bytes. Counting takes up to 115 while a table grows; training has a slot and up to five places for each byte.
const PIECE_COST: (u64, u64) = (128, 24);

#[derive(Clone, Copy, Default)]
struct Entry {
    low: u64,
    high: u64,
    count: u64,
}

impl Entry {
    fn key(&self) -> u128 {
        u128::from(self.high) << 64 | u128::from(self.low)
    }
}

/// Open addressing, linear probing, at most 5/8 full; a zero count marks a free slot.
struct ShortTable {
    entries: Vec<Entry>,
    used: usize,
}

impl ShortTable {
    fn new() -> Self {
        Self { entries: vec![Entry::default(); 1 << 12], used: 0 }
    }

    #[inline]
    fn add(&mut self, key: u128, count: u64) {
        let mask = self.entries.len() - 1;
        let (low, high) = (key as u64, (key >> 64) as u64);
        let mut slot = hash(key) as usize & mask;
        loop {
            let entry = &mut self.entries[slot];
            if entry.low == low && entry.high == high {
                entry.count += count;
                return;
            }
            if entry.count == 0 {
                *entry = Entry { low, high, count };
                self.used += 1;
                if self.used * 8 > self.entries.len() * 5 {
                    self.grow();
                }
                return;
            }
            slot = (slot + 1) & mask;
        }
    }

    /// Adds one to each key. All are looked for before any is changed: reads that do not wait for each other overlap
    /// their cache misses, which a table of this size has at most of them.
    fn add_each(&mut self, keys: &[u128]) {
        let mask = self.entries.len() - 1;
        let mut slots = [0; BATCH];
        let mut unknown = [0; BATCH];
        let mut unseen = 0;
        for (found, &key) in slots.iter_mut().zip(keys) {
            *found = hash(key) as usize & mask;
            let entry = &self.entries[*found];
            let hit = entry.low == key as u64 && entry.high == (key >> 64) as u64;
            unknown[unseen] = key;
            unseen += usize::from(!hit);
            // A free slot past the end of the table stands for a miss.
            *found = if hit { *found } else { usize::MAX };
        }
        for &slot in &slots[..keys.len()] {
            if let Some(entry) = self.entries.get_mut(slot) {
                entry.count += 1;
            }
        }
        for &key in &unknown[..unseen] {
            self.add(key, 1);
        }
    }

    #[cold]
    fn grow(&mut self) {
        let larger = vec![Entry::default(); self.entries.len() * 2];
        let old = std::mem::replace(&mut self.entries, larger);
        self.used = 0;
        for (key, count) in keys(&old) {
            self.add(key, count);
        }
    }
}

fn keys(entries: &[Entry]) -> impl Iterator<Item = (u128, u64)> + '_ {
    entries.iter().filter(|e| e.count > 0).map(|e| (e.key(), e.count))
}

struct LongEntry {
    start: usize,
    len: usize,
    count: u64,
}

/// Pieces without a [`Key`]: their bytes lie in one arena.
#[derive(Default)]
struct LongTable {
    arena: Vec<u8>,
    table: HashTable<LongEntry>,
}

impl LongTable {
    fn bytes(&self, entry: &LongEntry) -> &[u8] {
        &self.arena[entry.start..entry.start + entry.len]
    }

    fn add(&mut self, piece: &[u8], count: u64) {
        let Self { arena, table } = self;
        let bytes = |e: &LongEntry| e.start..e.start + e.len;
        if let Some(entry) = table.find_mut(hash_bytes(piece), |e| &arena[bytes(e)] == piece) {
            entry.count += count;
            return;
        }
        let entry = LongEntry { start: arena.len(), len: piece.len(), count };
        arena.extend_from_slice(piece);
        table.insert_unique(hash_bytes(piece), entry, |e| hash_bytes(&arena[bytes(e)]));
    }
}

/// Counts of distinct pieces. Pieces of a single byte are not kept: they hold no pair to merge.
pub struct PieceCounter {
    short: ShortTable,
    long: LongTable,
    pieces: u64,
}

impl Default for PieceCounter {
    fn default() -> Self {
        Self { short: ShortTable::new(), long: LongTable::default(), pieces: 0 }
    }
}

/// What [`PieceCounter::prune`] has dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// How often the bound was passed.
    pub times: u64,
    /// Distinct pieces dropped; one that came again and was dropped again counts twice.
    pub pieces: u64,
    /// How often those had occurred.
    pub occurrences: u64,
}

impl PieceCounter {
    /// Adds every piece of `text`.
    pub fn count_text(&mut self, splitter: &Splitter, text: &str) -> Result<()> {
        let mut keys = [0; BATCH];
        let mut len = 0;
        let mut pieces = 0;
        splitter.for_each(text, |bytes, start, end| {
            pieces += 1;
            let Some(key) = Key::of(bytes, start, end) else {
                self.long.add(&bytes[start..end], 1);
                return Ok(());
            };
            keys[len] = key.get();
            len += usize::from(end - start > 1);
            if len == BATCH {
                self.short.add_each(&keys);
                len = 0;
            }
            Ok(())
        })?;
        self.short.add_each(&keys[..len]);
        self.pieces += pieces;
        Ok(())
    }

    /// Moves the counts of another counter here. O(distinct pieces of the other).
    pub fn absorb(&mut self, other: &mut Self) {
        let Self { short, long, pieces } = std::mem::take(other);
        for (key, count) in keys(&short.entries) {
            self.short.add(key, count);
        }
        for entry in &long.table {
            self.long.add(long.bytes(entry), entry.count);
        }
        self.pieces += pieces;
    }

    /// Pieces counted, those of a single byte and those dropped since among them.
    pub fn pieces(&self) -> u64 {
        self.pieces
    }

    /// An upper estimate of the memory, in bytes, that training on these pieces takes. A function of the pieces alone:
    /// it knows nothing of threads or of the tables' present sizes.
    pub fn cost(&self) -> u64 {
        self.costs().map(|(_, cost)| cost).sum()
    }

    /// Count and cost of each piece.
    fn costs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let cost = |len: usize| PIECE_COST.0 + PIECE_COST.1 * len as u64;
        let short = keys(&self.short.entries).map(move |(key, count)| (count, cost((key >> 120) as usize)));
        short.chain(self.long.table.iter().map(move |entry| (entry.count, cost(entry.len))))
    }

    /// Drops the rarest pieces if the estimated cost is above `bound` bytes: all those with a count of at most `c`, for
    /// the smallest `c` that leaves no more than half the bound. O(distinct pieces).
    pub fn prune(&mut self, bound: u64) -> Pruned {
        let mut left = self.cost();
        if left <= bound {
            return Pruned::default();
        }
        let mut by_count: FxHashMap<u64, u64> = FxHashMap::default();
        self.costs().for_each(|(count, cost)| *by_count.entry(count).or_default() += cost);
        let mut by_count: Vec<(u64, u64)> = by_count.into_iter().collect();
        by_count.sort_unstable();
        let mut highest = 0;
        for (count, cost) in by_count {
            if left <= bound / 2 {
                break;
            }
            left -= cost;
            highest = count;
        }
        let mut pruned = Pruned { times: 1, ..Pruned::default() };
        let mut kept = Self { pieces: self.pieces, ..Self::default() };
        let mut keep = |count: u64| {
            let rare = count <= highest;
            pruned.pieces += u64::from(rare);
            pruned.occurrences += if rare { count } else { 0 };
            !rare
        };
        keys(&self.short.entries).filter(|&(_, count)| keep(count)).for_each(|(key, count)| kept.short.add(key, count));
        for entry in self.long.table.iter().filter(|entry| keep(entry.count)) {
            kept.long.add(self.long.bytes(entry), entry.count);
        }
        *self = kept;
        pruned
    }

    /// Number of distinct pieces of two bytes and more.
    pub fn len(&self) -> usize {
        self.short.used + self.long.table.len()
    }

    /// True if no piece was counted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces with the most frequent first, and the tables given back. O(n log n) in distinct pieces.
    pub fn into_words(self) -> Words {
        // Slots of the short table, then entries of the long one.
        let slots = self.short.entries.len();
        let mut long: Vec<&LongEntry> = self.long.table.iter().collect();
        long.sort_unstable_by_key(|entry| entry.start);
        let mut order: Vec<(u64, usize)> = Vec::with_capacity(self.len());
        order.extend(self.short.entries.iter().enumerate().filter(|(_, e)| e.count > 0).map(|(i, e)| (e.count, i)));
        order.extend(long.iter().enumerate().map(|(i, entry)| (entry.count, slots + i)));
        order.sort_unstable_by_key(|&(count, _)| std::cmp::Reverse(count));
        let mut words = Words::default();
        words.ends.reserve_exact(order.len());
        words.counts.reserve_exact(order.len());
        for &(count, index) in &order {
            if let Some(entry) = self.short.entries.get(index) {
                let (bytes, len) = unpack(entry.key());
                words.push(&bytes[..len], count);
            } else {
                words.push(self.long.bytes(long[index - slots]), count);
            }
        }
        words
    }
}

/// Distinct pieces end to end, in runs of falling counts.
#[derive(Default)]
pub struct Words {
    /// Bytes of all pieces.
    pub bytes: Vec<u8>,
    /// Where each piece ends in `bytes`.
    pub ends: Vec<usize>,
    /// How often each piece occurred; never rising.
    pub counts: Vec<u64>,
}

impl Words {
    /// Appends one piece; its count must not exceed the one before it.
    pub fn push(&mut self, piece: &[u8], count: u64) {
        debug_assert!(self.counts.last().is_none_or(|&last| last >= count));
        self.bytes.extend_from_slice(piece);
        self.ends.push(self.bytes.len());
        self.counts.push(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::GPT4_PATTERN;

    fn counter(texts: &[&str]) -> PieceCounter {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let mut counter = PieceCounter::default();
        for text in texts {
            counter.count_text(&splitter, text).unwrap();
        }
        counter
    }

    fn words_of(counter: PieceCounter) -> Vec<(String, u64)> {
        let words = counter.into_words();
        let starts = std::iter::once(0).chain(words.ends.iter().copied());
        let spans = starts.zip(&words.ends).zip(&words.counts);
        let mut all: Vec<_> =
            spans.map(|((s, &e), &c)| (String::from_utf8(words.bytes[s..e].to_vec()).unwrap(), c)).collect();
        all.sort();
        all
    }

    #[test]
    fn pruning_drops_the_rarest_first_and_says_what() {
        let texts = ["aa aa aa bb bb cc dd", " a-piece-that-is-long-enough-for-the-other-table", "aa"];
        let (before, mut pruned) = (counter(&texts), counter(&texts));
        assert_eq!(pruned.prune(before.cost()), Pruned::default());
        assert_eq!(words_of(counter(&texts)), words_of(pruned));
        let mut pruned = counter(&texts);
        let gone = pruned.prune(before.cost() - 1);
        assert!(pruned.cost() <= before.cost() / 2);
        assert_eq!(gone.times, 1);
        assert_eq!(gone.pieces as usize, before.len() - pruned.len());
        assert_eq!(pruned.pieces(), before.pieces());
        let left = words_of(pruned);
        assert!(left.iter().all(|&(_, count)| count > 1) && left.contains(&(" aa".to_owned(), 2)), "{left:?}");
    }

    #[test]
    fn pruning_may_drop_all_where_all_are_equally_rare() {
        let mut all = counter(&["aa bb cc dd"]);
        assert_eq!(all.prune(100), Pruned { times: 1, pieces: 4, occurrences: 4 });
        assert!(all.is_empty());
    }
}
