//! Counting pieces: how often each distinct piece occurs in a stream of texts.
//!
//! Texts are read once and forgotten; what stays is one entry per distinct piece. Time O(bytes), memory O(distinct
//! pieces). Counts are 64-bit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use hashbrown::HashTable;

use crate::error::{Error, Result};
use crate::key::{MAX_SHORT, hash, hash_bytes, pack, unpack};
use crate::split::Splitter;

/// Pieces counted together.
const BATCH: usize = 64;

#[derive(Clone, Copy, Default)]
struct Entry {
    low: u64,
    high: u64,
    count: u64,
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
    entries.iter().filter(|e| e.count > 0).map(|e| (u128::from(e.high) << 64 | u128::from(e.low), e.count))
}

struct LongEntry {
    start: usize,
    len: usize,
    count: u64,
}

/// Pieces of more than [`MAX_SHORT`] bytes: their bytes lie in one arena.
#[derive(Default)]
struct LongTable {
    arena: Vec<u8>,
    table: HashTable<LongEntry>,
}

impl LongTable {
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
}

impl Default for PieceCounter {
    fn default() -> Self {
        Self { short: ShortTable::new(), long: LongTable::default() }
    }
}

impl PieceCounter {
    /// Adds every piece of `text`.
    pub fn count_text(&mut self, splitter: &Splitter, text: &str) -> Result<()> {
        let mut keys = [0; BATCH];
        let mut len = 0;
        splitter.for_each(text, |bytes, start, end| {
            if end - start > MAX_SHORT {
                self.long.add(&bytes[start..end], 1);
                return;
            }
            keys[len] = pack(bytes, start, end);
            len += usize::from(end - start > 1);
            if len == BATCH {
                self.short.add_each(&keys);
                len = 0;
            }
        })?;
        self.short.add_each(&keys[..len]);
        Ok(())
    }

    /// Adds the counts of another counter.
    pub fn absorb(&mut self, other: &Self) {
        for (key, count) in keys(&other.short.entries) {
            self.short.add(key, count);
        }
        for entry in &other.long.table {
            self.long.add(&other.long.arena[entry.start..entry.start + entry.len], entry.count);
        }
    }

    /// Number of distinct pieces of two bytes and more.
    pub fn len(&self) -> usize {
        self.short.used + self.long.table.len()
    }

    /// True if no piece was counted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces with the most frequent first, and the tables given back.
    pub fn into_words(self) -> Words {
        let mut order: Vec<(u64, u128, u32)> = keys(&self.short.entries).map(|(key, count)| (count, key, 0)).collect();
        drop(self.short);
        let mut long: Vec<&LongEntry> = self.long.table.iter().collect();
        long.sort_unstable_by_key(|entry| entry.start);
        order.extend(long.iter().enumerate().map(|(i, entry)| (entry.count, 0, i as u32)));
        order.sort_unstable_by_key(|&(count, ..)| std::cmp::Reverse(count));
        let mut words = Words::default();
        for &(count, key, index) in &order {
            if key == 0 {
                let entry = long[index as usize];
                words.push(&self.long.arena[entry.start..entry.start + entry.len], count);
            } else {
                let (bytes, len) = unpack(key);
                words.push(&bytes[..len], count);
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

/// Counts the pieces of a stream of texts on `threads` threads.
///
/// `next` runs on the calling thread while the others count, and returns the next batch of texts, or `None` at the end.
/// At most `2 * threads + 1` batches are held at once.
///
/// # Errors
/// The first error of `next` or of the splitter.
pub fn count_stream<T: AsRef<str> + Send, E: From<Error>>(
    splitter: &Splitter,
    threads: usize,
    mut next: impl FnMut() -> std::result::Result<Option<Vec<T>>, E>,
) -> std::result::Result<PieceCounter, E> {
    let (sender, receiver) = sync_channel::<Vec<T>>(threads);
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Only the workers own the receiver: if all of them are gone, sending fails instead of waiting for ever.
        let receiver = Arc::new(Mutex::new(receiver));
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let (receiver, failed) = (Arc::clone(&receiver), &failed);
                scope.spawn(move || count_batches(splitter, &receiver, failed))
            })
            .collect();
        drop(receiver);
        let mut feed = || -> std::result::Result<(), E> {
            while let Some(batch) = next()? {
                if failed.load(Ordering::Relaxed) || sender.send(batch).is_err() {
                    break;
                }
            }
            Ok(())
        };
        let outcome = feed();
        drop(sender);
        let counted = workers.into_iter().map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        let counters = counted.collect::<Result<Vec<_>>>();
        outcome?;
        let mut counters = counters?.into_iter();
        let mut total = counters.next().unwrap_or_default();
        counters.for_each(|counter| total.absorb(&counter));
        Ok(total)
    })
}

/// One worker: counts batches until the sender is gone, or discards them once any worker has failed.
fn count_batches<T: AsRef<str>>(
    splitter: &Splitter,
    receiver: &Mutex<Receiver<Vec<T>>>,
    failed: &AtomicBool,
) -> Result<PieceCounter> {
    let mut counter = PieceCounter::default();
    let mut outcome = Ok(());
    loop {
        let batch = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(batch) = batch else { break };
        for text in &batch {
            if outcome.is_ok() && !failed.load(Ordering::Relaxed) {
                outcome = counter.count_text(splitter, text.as_ref());
            }
        }
        if outcome.is_err() {
            failed.store(true, Ordering::Relaxed);
        }
    }
    outcome.map(|()| counter)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::split::GPT4_PATTERN;

    fn counted(words: &Words) -> HashMap<Vec<u8>, u64> {
        let starts = std::iter::once(0).chain(words.ends.iter().copied());
        starts.zip(&words.ends).zip(&words.counts).map(|((s, &e), &c)| (words.bytes[s..e].to_vec(), c)).collect()
    }

    #[test]
    fn any_number_of_threads_counts_what_a_plain_map_counts() {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let texts: Vec<String> =
            (0..3000).map(|i| format!("word{} shared text, a{} {}", i % 700, "x".repeat(i % 40), i)).collect();
        let mut expected: HashMap<Vec<u8>, u64> = HashMap::new();
        for text in &texts {
            splitter.for_each(text, |bytes, s, e| *expected.entry(bytes[s..e].to_vec()).or_default() += 1).unwrap();
        }
        expected.retain(|piece, _| piece.len() > 1);
        for threads in [1, 2, 8] {
            let mut batches = texts.chunks(100).map(<[String]>::to_vec);
            let counter = count_stream::<_, Error>(&splitter, threads, || Ok(batches.next())).unwrap();
            assert_eq!(counter.len(), expected.len());
            let words = counter.into_words();
            assert!(words.counts.is_sorted_by(|a, b| a >= b));
            assert_eq!(counted(&words), expected);
        }
    }

    #[test]
    fn an_error_of_the_source_ends_the_count() {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let mut left = 50;
        let outcome = count_stream(&splitter, 2, || {
            left -= 1;
            if left == 0 { Err(Error::Interrupted) } else { Ok(Some(vec!["some text"; 10])) }
        });
        assert_eq!(outcome.err(), Some(Error::Interrupted));
    }
}
