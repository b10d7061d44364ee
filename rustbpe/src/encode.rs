//! Encoding: text to ids, on one thread; `batches` has many at work.
//!
//! A piece is looked up in a bounded cache of the thread, then in the vocabulary, and only then merged. Each thread
//! takes a cache of its own from a pool for the length of a call, so threads never wait for each other.

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

/// Bytes of text after which a long text asks whether to go on.
const CHECK_EVERY: usize = 1 << 16;

/// Asked every now and then by whatever may take long: an error ends it.
pub type Check<'a> = &'a mut (dyn FnMut() -> Result<()> + Send);

/// A piece of up to 15 bytes and its ids, if they are three or fewer; without a key, a free slot.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
struct Slot {
    key: Option<Key>,
    ids: [u32; 3],
    len: u32,
}

/// One thread's memory: bounded; each piece has one line it may be in, and pushes out the older of the two there.
pub struct Cache {
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
    /// Caches kept for later calls, one for each core: 8 MiB each.
    pool_max: usize,
}

impl Encoder {
    /// Joins a vocabulary and a pattern.
    pub fn new(vocab: Vocab, splitter: Splitter) -> Self {
        let pool_max = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { vocab, splitter, pool: Mutex::default(), pool_max }
    }

    /// The vocabulary.
    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// The pattern's matcher.
    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    pub(crate) fn with_cache<T>(&self, work: impl FnOnce(&mut Cache) -> T) -> T {
        let pool = || self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = pool().pop();
        let mut cache = taken.unwrap_or_else(Cache::new);
        let result = work(&mut cache);
        let mut pool = pool();
        if pool.len() < self.pool_max {
            pool.push(cache);
        }
        result
    }

    /// The ids of one text. O(bytes), n log n within a piece at worst.
    ///
    /// # Errors
    /// That of the splitter.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_checked(text, &mut || Ok(()))
    }

    /// [`Encoder::encode`] for whoever may want to stop it.
    ///
    /// # Errors
    /// That of the splitter, or of `check`.
    pub fn encode_checked(&self, text: &str, check: Check) -> Result<Vec<u32>> {
        let mut out = Vec::with_capacity(text.len() / 4 + 1);
        self.with_cache(|cache| self.encode_into(text, cache, &mut out, check))?;
        Ok(out)
    }

    /// Appends the ids of some texts.
    pub(crate) fn encode_texts<T: AsRef<str>>(
        &self,
        texts: &[T],
        cache: &mut Cache,
        flat: &mut Flat,
        check: Check,
    ) -> Result<()> {
        let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
        // Four bytes an id.
        flat.ids.reserve(bytes / 4 + 1);
        check()?;
        for text in texts {
            self.encode_into(text.as_ref(), cache, &mut flat.ids, check)?;
            flat.offsets.push(flat.ids.len());
        }
        Ok(())
    }

    fn encode_into(&self, text: &str, cache: &mut Cache, out: &mut Vec<u32>, check: Check) -> Result<()> {
        if text.len() >= u32::MAX as usize {
            return Err(Error::invalid(format!("a text of {} bytes is too long; 4 GiB is the most", text.len())));
        }
        let mut spans = [(0, 0); BATCH];
        let (mut len, mut checked) = (0, 0);
        self.splitter.for_each(text, |bytes, start, end| {
            spans[len] = (start as u32, end as u32);
            len += 1;
            if len < BATCH {
                return Ok(());
            }
            len = 0;
            if end - checked >= CHECK_EVERY {
                checked = end;
                check()?;
            }
            self.encode_pieces(bytes, &spans, cache, out, check)
        })?;
        self.encode_pieces(text.as_bytes(), &spans[..len], cache, out, check)
    }

    #[inline(never)]
    fn encode_pieces(
        &self,
        text: &[u8],
        spans: &[(u32, u32)],
        cache: &mut Cache,
        out: &mut Vec<u32>,
        check: Check,
    ) -> Result<()> {
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
                0 => self.merge(text, start as usize, end as usize, cache, out, check)?,
                1 => out.push(slot.ids[0]),
                len => out.extend_from_slice(&slot.ids[..len as usize]),
            }
        }
        Ok(())
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
    fn merge(
        &self,
        text: &[u8],
        start: usize,
        end: usize,
        cache: &mut Cache,
        out: &mut Vec<u32>,
        check: Check,
    ) -> Result<()> {
        let before = out.len();
        merge_piece(&self.vocab, &text[start..end], out, check)?;
        let made = &out[before..];
        if let Some(key) = Key::of(text, start, end).filter(|_| made.len() <= 3) {
            let mut ids = [0; 3];
            ids[..made.len()].copy_from_slice(made);
            cache.put(key, ids, made.len() as u32);
        }
        Ok(())
    }
}

/// The ids of some texts end to end, and where each begins and the last one ends.
pub struct Flat {
    /// All ids.
    pub ids: Vec<u32>,
    /// One entry more than texts.
    pub offsets: Vec<usize>,
}

impl Default for Flat {
    fn default() -> Self {
        Self { ids: Vec::new(), offsets: vec![0] }
    }
}

impl Flat {
    /// Adds the texts of `next` behind these.
    pub fn append(&mut self, next: &Self) {
        let base = self.ids.len();
        self.ids.extend_from_slice(&next.ids);
        self.offsets.extend(next.offsets[1..].iter().map(|&end| base + end));
    }
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
