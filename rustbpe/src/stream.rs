//! Counting a stream: threads count while the caller reads, within a bound on memory.
//!
//! Texts are read once and forgotten. With a bound the stream is cut into rounds of `bound / 64` bytes of text. After
//! each round the threads' tables are joined, and if training on what is there would cost more than the bound, the
//! rarest pieces are dropped ([`PieceCounter::prune`]). What a round holds and what is dropped depend on the stream and
//! the bound, not on the number of threads. A piece that was dropped starts from zero when it comes again, so a piece
//! may be counted too low, by what was dropped of it; the report says how much was dropped in all.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use crate::count::{PieceCounter, Pruned};
use crate::error::{Error, Result};
use crate::split::Splitter;

/// Rounds in a bound: all text of a round could be new pieces, whose table takes less than 40 bytes a byte of text.
const ROUNDS: u64 = 64;

/// Text of a round at least, in bytes.
const MIN_ROUND: u64 = 1 << 16;

/// How to count.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Threads that count, beside the one that reads. With none that the system gives, the one that reads counts.
    pub threads: usize,
    /// Memory, in bytes, that counting and training may take, as [`PieceCounter::cost`] estimates it.
    pub max_memory: Option<u64>,
}

/// Counts the pieces of a stream of texts. O(bytes) time; O(distinct pieces) memory, or the bound.
///
/// `next` runs on the calling thread while the others count, and returns the next batch of texts, or `None` at the end.
/// At most `2 * threads + 1` batches are held at once. `pieces` is kept up to date for whoever shows progress.
///
/// # Errors
/// The first error of `next` or of the splitter.
pub fn count_stream<T: AsRef<str> + Send, E: From<Error>>(
    splitter: &Splitter,
    limits: Limits,
    pieces: &AtomicU64,
    mut next: impl FnMut() -> std::result::Result<Option<Vec<T>>, E>,
) -> std::result::Result<(PieceCounter, Pruned), E> {
    let mut counters: Vec<PieceCounter> = (0..=limits.threads.max(1)).map(|_| PieceCounter::default()).collect();
    let mut pruned = Pruned::default();
    let round = limits.max_memory.map_or(u64::MAX, |bound| (bound / ROUNDS).max(MIN_ROUND));
    loop {
        let more = count_round(splitter, &mut counters, pieces, &mut next, round)?;
        let (total, others) = counters.split_at_mut(1);
        for other in others {
            total[0].absorb(other);
        }
        if let Some(bound) = limits.max_memory {
            let now = total[0].prune(bound);
            pruned.times += now.times;
            pruned.pieces += now.pieces;
            pruned.occurrences += now.occurrences;
        }
        if !more {
            return Ok((counters.swap_remove(0), pruned));
        }
    }
}

/// Counts batches of `round` bytes in all, each thread into its own counter; the first is the calling thread's. False if
/// the stream has ended.
fn count_round<T: AsRef<str> + Send, E: From<Error>>(
    splitter: &Splitter,
    counters: &mut [PieceCounter],
    pieces: &AtomicU64,
    next: &mut impl FnMut() -> std::result::Result<Option<Vec<T>>, E>,
    round: u64,
) -> std::result::Result<bool, E> {
    let [own, others @ ..] = counters else { return Ok(false) };
    let (sender, receiver) = sync_channel::<Vec<T>>(others.len());
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Only the workers own the receiver: if all of them are gone, sending fails instead of waiting for ever.
        let receiver = Arc::new(Mutex::new(receiver));
        // As many as the system gives.
        let workers: Vec<_> = others
            .iter_mut()
            .map_while(|counter| {
                let (receiver, failed) = (Arc::clone(&receiver), &failed);
                let work = move || count_batches(splitter, counter, &receiver, failed, pieces);
                std::thread::Builder::new().spawn_scoped(scope, work).ok()
            })
            .collect();
        drop(receiver);
        let mut feed = || -> std::result::Result<bool, E> {
            let mut bytes = 0;
            while bytes < round {
                let Some(batch) = next()? else { return Ok(false) };
                bytes += batch.iter().map(|text| text.as_ref().len() as u64).sum::<u64>();
                if workers.is_empty() {
                    count_batch(splitter, own, &batch, pieces)?;
                } else if failed.load(Ordering::Relaxed) || sender.send(batch).is_err() {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        let outcome = feed();
        drop(sender);
        let counted = workers.into_iter().map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        let counted = counted.collect::<Result<Vec<()>>>();
        let more = outcome?;
        counted?;
        Ok(more)
    })
}

/// One worker: counts batches until the sender is gone, or discards them once any worker has failed.
fn count_batches<T: AsRef<str>>(
    splitter: &Splitter,
    counter: &mut PieceCounter,
    receiver: &Mutex<Receiver<Vec<T>>>,
    failed: &AtomicBool,
    pieces: &AtomicU64,
) -> Result<()> {
    let mut outcome = Ok(());
    loop {
        let batch = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(batch) = batch else { break };
        if outcome.is_ok() && !failed.load(Ordering::Relaxed) {
            outcome = count_batch(splitter, counter, &batch, pieces);
        }
        if outcome.is_err() {
            failed.store(true, Ordering::Relaxed);
        }
    }
    outcome
}

fn count_batch<T: AsRef<str>>(
    splitter: &Splitter,
    counter: &mut PieceCounter,
    batch: &[T],
    pieces: &AtomicU64,
) -> Result<()> {
    let before = counter.pieces();
    let outcome = batch.iter().try_for_each(|text| counter.count_text(splitter, text.as_ref()));
    pieces.fetch_add(counter.pieces() - before, Ordering::Relaxed);
    outcome
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::count::Words;
    use crate::split::GPT4_PATTERN;

    fn counted(words: &Words) -> HashMap<Vec<u8>, u64> {
        let starts = std::iter::once(0).chain(words.ends.iter().copied());
        starts.zip(&words.ends).zip(&words.counts).map(|((s, &e), &c)| (words.bytes[s..e].to_vec(), c)).collect()
    }

    fn texts() -> Vec<String> {
        (0..3000).map(|i| format!("word{} shared text, a{} {}", i % 700, "x".repeat(i % 40), i)).collect()
    }

    fn count(texts: &[String], threads: usize, max_memory: Option<u64>) -> (PieceCounter, Pruned, u64) {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let mut batches = texts.chunks(100).map(<[String]>::to_vec);
        let pieces = AtomicU64::new(0);
        let limits = Limits { threads, max_memory };
        let (counter, pruned) = count_stream::<_, Error>(&splitter, limits, &pieces, || Ok(batches.next())).unwrap();
        (counter, pruned, pieces.into_inner())
    }

    #[test]
    fn any_number_of_threads_counts_what_a_plain_map_counts() {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let texts = texts();
        let mut expected: HashMap<Vec<u8>, u64> = HashMap::new();
        for text in &texts {
            let add = |bytes: &[u8], s: usize, e: usize| {
                *expected.entry(bytes[s..e].to_vec()).or_default() += 1;
                Ok(())
            };
            splitter.for_each(text, add).unwrap();
        }
        let all: u64 = expected.values().sum();
        expected.retain(|piece, _| piece.len() > 1);
        for threads in [1, 2, 8] {
            let (counter, pruned, pieces) = count(&texts, threads, None);
            assert_eq!((pruned, pieces, counter.pieces()), (Pruned::default(), all, all));
            assert_eq!(counter.len(), expected.len());
            let words = counter.into_words();
            assert!(words.counts.is_sorted_by(|a, b| a >= b));
            assert_eq!(counted(&words), expected);
        }
    }

    #[test]
    fn what_a_bound_drops_does_not_depend_on_threads() {
        // Five letters spell the number of the text: a new piece in each.
        let name = |i: usize| (0..5).map(|k| char::from(b'a' + (i >> (4 * k) & 15) as u8)).collect::<String>();
        let texts: Vec<String> =
            (0..10).flat_map(|_| texts()).enumerate().map(|(i, text)| format!("{text} {}", name(i))).collect();
        let bound = 1 << 20;
        let (one, pruned, _) = count(&texts, 1, Some(bound));
        assert!(pruned.times > 1 && pruned.occurrences >= pruned.pieces, "{pruned:?}");
        assert!(one.cost() <= bound);
        let one = counted(&one.into_words());
        assert!(one.contains_key(b" shared".as_slice()));
        for threads in [2, 8] {
            let (counter, same, _) = count(&texts, threads, Some(bound));
            assert_eq!(same, pruned);
            assert_eq!(counted(&counter.into_words()), one);
        }
    }

    #[test]
    fn an_error_of_the_source_ends_the_count() {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let mut left = 50;
        let limits = Limits { threads: 2, max_memory: None };
        let outcome = count_stream(&splitter, limits, &AtomicU64::new(0), || {
            left -= 1;
            if left == 0 { Err(Error::Interrupted) } else { Ok(Some(vec!["some text"; 10])) }
        });
        assert_eq!(outcome.err(), Some(Error::Interrupted));
    }
}
