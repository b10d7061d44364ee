//! Encoding: text to ids, one thread or many.
//!
//! A piece is looked up in a bounded cache of the thread, then in the vocabulary, and only then merged. Each thread
//! takes a cache of its own from a pool for the length of a call, so threads never wait for each other.

use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::key::{Key, hash};
use crate::merge::merge_piece;
use crate::split::Splitter;
use crate::vocab::Vocab;

/// Pairs of entries in a thread's cache, 64 bytes a pair: one line of a processor's cache. 8 MiB in all.
const CACHE_LINES: usize = 1 << 17;

/// Pieces looked up together: the reads of one batch do not wait for each other, so their cache misses overlap.
const BATCH: usize = 64;

/// Caches kept for later calls; more are made while more threads are at work, and dropped after.
const POOL_MAX: usize = 64;

/// Below this many bytes a batch is not worth a second thread.
const PARALLEL_MIN_BYTES: usize = 1 << 16;

/// Bytes of one unit of work of a thread.
const UNIT_BYTES: usize = 1 << 18;

/// A piece of up to 15 bytes and its ids, if they are three or fewer; without a key, a free slot.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
struct Slot {
    key: Option<Key>,
    ids: [u32; 3],
    len: u32,
}

/// One thread's memory: bounded; each piece has one line it may be in, and pushes out the older of the two there.
struct Cache {
    lines: Vec<Line>,
}

#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Line([Slot; 2]);

impl Cache {
    fn new() -> Self {
        Self { lines: vec![Line::default(); CACHE_LINES] }
    }

    fn index(key: Key) -> usize {
        (hash(key.get()) >> 20) as usize % CACHE_LINES
    }

    /// The slot that holds `key`, if one does.
    #[inline]
    fn get(&self, key: Key) -> Option<Slot> {
        let Line(line) = &self.lines[Self::index(key)];
        let slot = line[usize::from(line[1].key == Some(key))];
        (slot.key == Some(key)).then_some(slot)
    }

    fn put(&mut self, key: Key, ids: [u32; 3], len: u32) {
        let Line(line) = &mut self.lines[Self::index(key)];
        *line = [Slot { key: Some(key), ids, len }, line[0]];
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

    /// The ids of all texts end to end, and where each text ends, on up to `threads` threads. O(bytes).
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], threads: usize) -> Result<(Vec<u32>, Vec<usize>)> {
        if threads <= 1 {
            let mut unit = Unit::for_texts(texts);
            self.with_cache(|cache| self.encode_unit(texts, cache, &mut unit))?;
            return Ok(gather(vec![unit], 1));
        }
        let mut units = units(texts).into_iter();
        self.encode_stream(threads, || Ok(units.next().map(|range| texts[range].iter().collect())), |work| work())
    }

    /// [`Encoder::encode_batch`] for batches of texts that `next` makes on the calling thread while the others encode;
    /// afterwards the calling thread encodes too, inside `release`.
    ///
    /// # Errors
    /// The first error of `next`, or of the splitter.
    pub fn encode_stream<T: AsRef<str> + Send, E: From<Error>>(
        &self,
        threads: usize,
        mut next: impl FnMut() -> std::result::Result<Option<Vec<T>>, E>,
        release: impl FnOnce(&mut (dyn FnMut() + Send)),
    ) -> std::result::Result<(Vec<u32>, Vec<usize>), E> {
        let (sender, receiver) = channel::<(usize, Vec<T>)>();
        let receiver = Mutex::new(receiver);
        // A batch is held to the end: it may be the caller's own thread that has to drop it.
        let work = || {
            self.with_cache(|cache| {
                let mut done = Vec::new();
                loop {
                    let batch = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((index, texts)) = batch else { return Ok(done) };
                    let mut unit = Unit::for_texts(&texts);
                    self.encode_unit(&texts, cache, &mut unit)?;
                    done.push((index, texts, unit));
                }
            })
        };
        let mut done: Vec<(usize, Vec<T>, Unit)> = std::thread::scope(|scope| {
            let mut others = Vec::new();
            let mut feed = || -> std::result::Result<(), E> {
                for index in 0.. {
                    let Some(batch) = next()? else { break };
                    // The first batch may be all there is.
                    if 0 < index && index < threads {
                        others.push(scope.spawn(work));
                    }
                    if sender.send((index, batch)).is_err() {
                        break;
                    }
                }
                Ok(())
            };
            let outcome = feed();
            drop(sender);
            let mut results: Vec<Result<_>> = Vec::new();
            if outcome.is_ok() {
                release(&mut || results.push(work()));
            }
            results.extend(others.into_iter().map(|w| w.join().unwrap_or_else(|p| std::panic::resume_unwind(p))));
            outcome?;
            let all: Vec<Vec<_>> = results.into_iter().collect::<Result<_>>()?;
            Ok::<_, E>(all.into_iter().flatten().collect())
        })?;
        done.sort_unstable_by_key(|&(index, ..)| index);
        Ok(gather(done.into_iter().map(|(_, _, unit)| unit).collect(), threads))
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
        let mut spans = [(0, 0); BATCH];
        let mut len = 0;
        self.splitter.for_each(text, |bytes, start, end| {
            spans[len] = (start as u32, end as u32);
            len += 1;
            if len == BATCH {
                self.encode_pieces(bytes, &spans, cache, out);
                len = 0;
            }
        })?;
        self.encode_pieces(text.as_bytes(), &spans[..len], cache, out);
        Ok(())
    }

    #[inline(never)]
    fn encode_pieces(&self, text: &[u8], spans: &[(u32, u32)], cache: &mut Cache, out: &mut Vec<u32>) {
        let mut slots = [Slot::default(); BATCH];
        let mut unknown = [0u8; BATCH];
        let mut unknowns = 0;
        for (i, (slot, &(start, end))) in slots.iter_mut().zip(spans).enumerate() {
            let found = Key::of(text, start as usize, end as usize).and_then(|key| cache.get(key));
            *slot = found.unwrap_or_default();
            unknown[unknowns] = i as u8;
            unknowns += usize::from(found.is_none());
        }
        for &i in &unknown[..unknowns] {
            let (start, end) = spans[usize::from(i)];
            slots[usize::from(i)] = self.look_up(text, start as usize, end as usize, cache);
        }
        for (slot, &(start, end)) in slots.iter().zip(spans) {
            match slot.len {
                0 => self.merge(text, start as usize, end as usize, cache, out),
                1 => out.push(slot.ids[0]),
                len => out.extend_from_slice(&slot.ids[..len as usize]),
            }
        }
    }

    /// A piece that the cache does not hold, if it is a token; else an empty slot.
    fn look_up(&self, text: &[u8], start: usize, end: usize, cache: &mut Cache) -> Slot {
        let Some(id) = self.vocab.find(text, start, end) else { return Slot::default() };
        let (key, ids) = (Key::of(text, start, end), [id, 0, 0]);
        if let Some(key) = key {
            cache.put(key, ids, 1);
        }
        Slot { key, ids, len: 1 }
    }

    /// A piece that is no token.
    fn merge(&self, text: &[u8], start: usize, end: usize, cache: &mut Cache, out: &mut Vec<u32>) {
        let before = out.len();
        merge_piece(&self.vocab, &text[start..end], out);
        let made = &out[before..];
        if let Some(key) = Key::of(text, start, end).filter(|_| made.len() <= 3) {
            let mut ids = [0; 3];
            ids[..made.len()].copy_from_slice(made);
            cache.put(key, ids, made.len() as u32);
        }
    }
}

/// Ids of some consecutive texts and where each ends.
struct Unit {
    ids: Vec<u32>,
    ends: Vec<usize>,
}

impl Unit {
    /// Room for the ids of `texts`, at four bytes an id.
    fn for_texts<T: AsRef<str>>(texts: &[T]) -> Self {
        let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
        Self { ids: Vec::with_capacity(bytes / 4 + 1), ends: Vec::with_capacity(texts.len()) }
    }
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

/// The ids of all units end to end, copied by as many threads: what a copy costs is mostly the first touch of its pages.
fn gather(mut units: Vec<Unit>, threads: usize) -> (Vec<u32>, Vec<usize>) {
    let mut offsets = vec![0];
    let mut base = 0;
    for unit in &units {
        offsets.extend(unit.ends.iter().map(|&end| base + end));
        base += unit.ids.len();
    }
    if units.len() <= 1 {
        return (units.pop().map(|unit| unit.ids).unwrap_or_default(), offsets);
    }
    let mut ids = vec![0; base];
    let mut rest = ids.as_mut_slice();
    std::thread::scope(|scope| {
        let mut shares = units.chunks(units.len().div_ceil(threads)).peekable();
        while let Some(share) = shares.next() {
            let (room, after) = std::mem::take(&mut rest).split_at_mut(share.iter().map(|unit| unit.ids.len()).sum());
            rest = after;
            let copy = move || {
                let mut room = room;
                for unit in share {
                    let (own, after) = room.split_at_mut(unit.ids.len());
                    own.copy_from_slice(&unit.ids);
                    room = after;
                }
            };
            if shares.peek().is_some() {
                scope.spawn(copy);
            } else {
                copy();
            }
        }
    });
    (ids, offsets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::GPT4_PATTERN;

    /// A token that no merge makes, longer than what the cache takes and not, is found whatever the cache has seen.
    #[test]
    fn a_token_that_merging_does_not_reach_is_found_by_a_cold_and_by_a_warm_cache() {
        // Three pieces for each line of the cache, so that hardly a slot stays free.
        let letters = |i: usize| (0..5).map(move |k| char::from(b'a' + (i >> (4 * k) & 15) as u8));
        let filling: String = (0..3 * CACHE_LINES).flat_map(|i| [' '].into_iter().chain(letters(i))).collect();
        for len in [2, 15, 16, 64, 65] {
            let bytes = (0..=255u8).map(|byte| vec![byte]);
            let tokens: Vec<_> = bytes.chain([vec![b'a'; len]]).collect();
            let encoder = Encoder::new(Vocab::from_tokens(&tokens).unwrap(), Splitter::new(GPT4_PATTERN).unwrap());
            let text = "a".repeat(len);
            assert_eq!(encoder.encode(&text).unwrap(), [256], "cold, {len}");
            encoder.encode(&filling).unwrap();
            assert_eq!(encoder.encode(&text).unwrap(), [256], "warm, {len}");
        }
    }

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
        assert_eq!(encoder.vocab().decode(ids.into_iter()).unwrap().len(), 1_000_001);
    }
}
