//! Encoding: text to ids, one thread or many.
//!
//! A piece is looked up in a bounded cache of the thread, then in the vocabulary, and only then merged. Each thread
//! takes a cache of its own from a pool for the length of a call, so threads never wait for each other.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::key::{MAX_SHORT, hash, pack};
use crate::merge::{Scratch, merge_piece};
use crate::split::Splitter;
use crate::vocab::Vocab;

/// 2^14 entries of 32 bytes: half a core's second-level cache on the machines measured.
const CACHE_SLOTS: usize = 1 << 14;

/// Caches kept for later calls; more are made while more threads are at work, and dropped after.
const POOL_MAX: usize = 64;

/// Below this many bytes a batch is not worth a second thread.
const PARALLEL_MIN_BYTES: usize = 1 << 16;

/// Bytes of one unit of work of a thread.
const UNIT_BYTES: usize = 1 << 18;

/// A piece of up to 15 bytes and its ids, if they are three or fewer.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
struct Slot {
    key: [u64; 2],
    ids: [u32; 3],
    len: u32,
}

/// One thread's memory: bounded, direct-mapped; a newer piece replaces an older one in its slot.
struct Cache {
    slots: Vec<Slot>,
    scratch: Scratch,
}

impl Cache {
    fn new() -> Self {
        Self { slots: vec![Slot::default(); CACHE_SLOTS], scratch: Scratch::default() }
    }
}

/// A vocabulary with a pattern.
pub struct Encoder {
    vocab: Vocab,
    splitter: Splitter,
    pool: Mutex<Vec<Cache>>,
}

impl Encoder {
    /// Joins a vocabulary and a pattern.
    pub fn new(vocab: Vocab, splitter: Splitter) -> Self {
        Self { vocab, splitter, pool: Mutex::default() }
    }

    /// The vocabulary.
    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// The pattern's matcher.
    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    fn with_cache<T>(&self, work: impl FnOnce(&mut Cache) -> T) -> T {
        let pool = || self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = pool().pop();
        let mut cache = taken.unwrap_or_else(Cache::new);
        let result = work(&mut cache);
        let mut pool = pool();
        if pool.len() < POOL_MAX {
            pool.push(cache);
        }
        result
    }

    /// The ids of one text. O(bytes), n log n within a piece at worst.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut out = Vec::with_capacity(text.len() / 4 + 1);
        self.with_cache(|cache| self.encode_into(text, cache, &mut out))?;
        Ok(out)
    }

    /// The ids of all texts end to end, and where each text ends, on up to `threads` threads.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], threads: usize) -> Result<(Vec<u32>, Vec<usize>)> {
        let units = units(texts);
        let threads = threads.min(units.len());
        if threads <= 1 {
            let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
            let mut unit = Unit { ids: Vec::with_capacity(bytes / 4 + 1), ends: Vec::with_capacity(texts.len()) };
            self.with_cache(|cache| self.encode_unit(texts, cache, &mut unit))?;
            return Ok(gather(vec![unit]));
        }
        let next = AtomicUsize::new(0);
        let done: Vec<Mutex<Unit>> = units.iter().map(|_| Mutex::default()).collect();
        let work = || -> Result<()> {
            self.with_cache(|cache| {
                while let Some(range) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut unit = Unit::default();
                    self.encode_unit(&texts[range.clone()], cache, &mut unit)?;
                    let index = units.partition_point(|other| other.start < range.start);
                    *done[index].lock().unwrap_or_else(PoisonError::into_inner) = unit;
                }
                Ok(())
            })
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mine = work();
            let theirs = others.into_iter().map(|w| w.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
            theirs.fold(mine, std::result::Result::and)
        })?;
        Ok(gather(done.into_iter().map(|unit| unit.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()))
    }

    fn encode_unit<T: AsRef<str>>(&self, texts: &[T], cache: &mut Cache, unit: &mut Unit) -> Result<()> {
        for text in texts {
            self.encode_into(text.as_ref(), cache, &mut unit.ids)?;
            unit.ends.push(unit.ids.len());
        }
        Ok(())
    }

    fn encode_into(&self, text: &str, cache: &mut Cache, out: &mut Vec<u32>) -> Result<()> {
        if text.len() >= u32::MAX as usize {
            return Err(Error::invalid(format!("a text of {} bytes is too long; 4 GiB is the most", text.len())));
        }
        self.splitter.for_each(text, |bytes, start, end| {
            if end - start <= MAX_SHORT {
                self.encode_short(bytes, start, end, cache, out);
            } else if let Some(id) = self.vocab.find(bytes, start, end) {
                out.push(id);
            } else {
                merge_piece(&self.vocab, &bytes[start..end], &mut cache.scratch, out);
            }
        })
    }

    #[inline]
    fn encode_short(&self, text: &[u8], start: usize, end: usize, cache: &mut Cache, out: &mut Vec<u32>) {
        let key = pack(text, start, end);
        let words = [key as u64, (key >> 64) as u64];
        let index = (hash(key) >> 20) as usize % CACHE_SLOTS;
        let slot = &cache.slots[index];
        if slot.key == words {
            out.extend_from_slice(&slot.ids[..slot.len as usize]);
            return;
        }
        let before = out.len();
        match self.vocab.find_short(key) {
            Some(id) => out.push(id),
            None => merge_piece(&self.vocab, &text[start..end], &mut cache.scratch, out),
        }
        let made = &out[before..];
        if made.len() <= 3 {
            let mut ids = [0; 3];
            ids[..made.len()].copy_from_slice(made);
            cache.slots[index] = Slot { key: words, ids, len: made.len() as u32 };
        }
    }
}

/// Ids of some consecutive texts and where each ends.
#[derive(Default)]
struct Unit {
    ids: Vec<u32>,
    ends: Vec<usize>,
}

/// Consecutive ranges of texts of about [`UNIT_BYTES`] each; one range if all is short.
fn units<T: AsRef<str>>(texts: &[T]) -> Vec<std::ops::Range<usize>> {
    let total: usize = texts.iter().map(|text| text.as_ref().len()).sum();
    let unit_bytes = if total < PARALLEL_MIN_BYTES { usize::MAX } else { UNIT_BYTES.min(total / 16) };
    let (mut units, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (i, text) in texts.iter().enumerate() {
        bytes += text.as_ref().len();
        if bytes >= unit_bytes {
            units.push(start..i + 1);
            (start, bytes) = (i + 1, 0);
        }
    }
    if start < texts.len() {
        units.push(start..texts.len());
    }
    units
}

fn gather(units: Vec<Unit>) -> (Vec<u32>, Vec<usize>) {
    let mut offsets = vec![0];
    let mut base = 0;
    for unit in &units {
        offsets.extend(unit.ends.iter().map(|&end| base + end));
        base += unit.ids.len();
    }
    let mut units = units.into_iter().map(|unit| unit.ids);
    let mut ids = units.next().unwrap_or_default();
    ids.reserve_exact(base - ids.len());
    units.for_each(|unit| ids.extend_from_slice(&unit));
    (ids, offsets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::GPT4_PATTERN;

    fn encoder() -> Encoder {
        let merges = [(104, 101), (108, 108), (256, 257), (258, 111), (32, 259), (97, 97), (261, 261)];
        Encoder::new(Vocab::from_merges(&merges).unwrap(), Splitter::new(GPT4_PATTERN).unwrap())
    }

    #[test]
    fn threads_and_single_calls_agree() {
        let encoder = encoder();
        let texts: Vec<String> = (0..4000).map(|i| format!("hello hello{} {}", "a".repeat(i % 90), i)).collect();
        let one: Vec<Vec<u32>> = texts.iter().map(|text| encoder.encode(text).unwrap()).collect();
        for threads in [1, 2, 8] {
            let (ids, offsets) = encoder.encode_batch(&texts, threads).unwrap();
            assert_eq!(ids, one.concat());
            let lens: Vec<usize> = offsets.windows(2).map(|w| w[1] - w[0]).collect();
            assert_eq!(lens, one.iter().map(Vec::len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn nothing_gives_nothing() {
        let encoder = encoder();
        assert!(encoder.encode("").unwrap().is_empty());
        assert_eq!(encoder.encode_batch::<&str>(&[], 4).unwrap(), (vec![], vec![0]));
        assert_eq!(encoder.encode_batch(&["", ""], 4).unwrap(), (vec![], vec![0, 0, 0]));
    }

    #[test]
    fn a_long_run_is_encoded_in_rounds() {
        let encoder = encoder();
        let ids = encoder.encode(&"a".repeat(1_000_001)).unwrap();
        assert_eq!(ids.len(), 250_001);
        let mut bytes = Vec::new();
        encoder.vocab().decode(&ids, &mut bytes).unwrap();
        assert_eq!(bytes.len(), 1_000_001);
    }
}
