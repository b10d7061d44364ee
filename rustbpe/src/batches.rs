//! Encoding of a stream of texts on several threads, while the caller reads the next ones.
//!
//! Memory: the ids once, a few batches of texts, and the ids of batches that came before their turn. Texts are given
//! back to the calling thread as they are done with, since they may be objects that only it may drop.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::encode::{Cache, Check, Encoder, Flat};
use crate::error::{Error, Result};

/// Bytes of text of one batch: about a millisecond of a thread's work.
const BATCH_BYTES: usize = 1 << 17;

/// Batches that wait for a thread, for each thread; above it the calling thread encodes instead of reading on.
const WAITING: usize = 2;

/// How often the calling thread looks up while it waits for the last batches of the others.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Encodes all texts of `next`, which runs on the calling thread, on up to `threads` threads, that one included.
///
/// The calling thread's own encoding runs inside `release`, and asks `check` whether to go on; threads that the system
/// does not give are done without.
///
/// # Errors
/// The first error of `next`, of `check`, or of the splitter.
pub fn encode_stream<T: AsRef<str> + Send, E: From<Error>>(
    encoder: &Encoder,
    threads: usize,
    mut next: impl FnMut() -> std::result::Result<Option<T>, E>,
    mut release: impl FnMut(&mut (dyn FnMut() + Send)),
    check: Check,
) -> std::result::Result<Flat, E> {
    let crew = Crew::new(encoder);
    std::thread::scope(|scope| {
        let closing = Closing(&crew);
        let (mut others, mut more) = (0, true);
        let mut feed = || {
            for index in 0.. {
                let spent = std::mem::take(&mut crew.lock().spent);
                drop(spent);
                let Some(batch) = next_batch(&mut next)? else { break };
                // The first batch may be all there is.
                if more && 0 < index && others + 1 < threads {
                    more = std::thread::Builder::new().spawn_scoped(scope, || crew.work()).is_ok();
                    others += usize::from(more);
                }
                let mut left = crew.offer(index, batch, others * WAITING).map(|batch| (index, batch));
                if left.is_some() {
                    release(&mut || crew.encode_here(left.take(), check));
                }
                crew.lock().outcome.clone()?;
            }
            Ok::<(), E>(())
        };
        let outcome = feed();
        crew.close(outcome.is_err());
        release(&mut || crew.encode_rest(check));
        drop(closing);
        outcome
    })?;
    let state = crew.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    state.outcome?;
    Ok(state.flat)
}

fn next_batch<T: AsRef<str>, E>(
    next: &mut impl FnMut() -> std::result::Result<Option<T>, E>,
) -> std::result::Result<Option<Vec<T>>, E> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while bytes < BATCH_BYTES {
        let Some(text) = next()? else { break };
        bytes += text.as_ref().len();
        batch.push(text);
    }
    Ok((!batch.is_empty()).then_some(batch))
}

/// The threads that encode the batches of one stream, and what they share.
struct Crew<'e, T> {
    encoder: &'e Encoder,
    state: Mutex<State<T>>,
    /// A batch came, or the last one did.
    queued: Condvar,
    /// A thread went home.
    gone: Condvar,
    stop: AtomicBool,
}

struct State<T> {
    queue: VecDeque<(usize, Vec<T>)>,
    closed: bool,
    /// Threads that have begun, without the calling one.
    at_work: usize,
    /// Texts that are done with.
    spent: Vec<Vec<T>>,
    flat: Flat,
    /// Ids of batches that came before their turn.
    early: BTreeMap<usize, Flat>,
    /// Batches that are in `flat`.
    joined: usize,
    outcome: Result<()>,
}

impl<T> State<T> {
    fn next_in_turn(&mut self) -> Option<Flat> {
        self.early.remove(&self.joined)
    }
}

/// Closes the stream if the calling thread panics: the others would wait for ever.
struct Closing<'a, 'e, T: AsRef<str>>(&'a Crew<'e, T>);

impl<T: AsRef<str>> Drop for Closing<'_, '_, T> {
    fn drop(&mut self) {
        self.0.close(std::thread::panicking());
    }
}

/// A thread's time at work, which ends with it whatever happens.
struct Shift<'a, 'e, T>(&'a Crew<'e, T>);

impl<T> Drop for Shift<'_, '_, T> {
    fn drop(&mut self) {
        self.0.lock().at_work -= 1;
        self.0.gone.notify_all();
    }
}

impl Encoder {
    /// The ids of all texts end to end, and where each begins and the last one ends, on up to `threads` threads. O(bytes).
    ///
    /// # Errors
    /// That of the splitter.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], threads: usize) -> Result<(Vec<u32>, Vec<usize>)> {
        let mut texts = texts.iter();
        let flat = encode_stream(self, threads, || Ok(texts.next()), |work| work(), &mut || Ok(()));
        flat.map(|Flat { ids, offsets }| (ids, offsets))
    }
}

impl<'e, T: AsRef<str>> Crew<'e, T> {
    fn new(encoder: &'e Encoder) -> Self {
        let state = State {
            queue: VecDeque::new(),
            closed: false,
            at_work: 0,
            spent: Vec::new(),
            flat: Flat::default(),
            early: BTreeMap::new(),
            joined: 0,
            outcome: Ok(()),
        };
        Self { encoder, state: Mutex::new(state), queued: Condvar::new(), gone: Condvar::new(), stop: false.into() }
    }

    /// Hands a batch to the other threads, or gives it back if `most` are waiting already.
    fn offer(&self, index: usize, batch: Vec<T>, most: usize) -> Option<Vec<T>> {
        let mut state = self.lock();
        if state.queue.len() >= most {
            return Some(batch);
        }
        state.queue.push_back((index, batch));
        self.queued.notify_one();
        None
    }

    /// Says that no batch comes any more; those that wait are not worth encoding if the stream has failed.
    fn close(&self, failed: bool) {
        let mut state = self.lock();
        state.closed = true;
        if failed && state.outcome.is_ok() {
            self.fail(&mut state, Error::Interrupted);
        }
        self.queued.notify_all();
    }

    fn fail(&self, state: &mut State<T>, error: Error) {
        self.stop.store(true, Ordering::Relaxed);
        if state.outcome.is_ok() {
            state.outcome = Err(error);
        }
        let left = state.queue.drain(..).map(|(_, texts)| texts);
        state.spent.extend(left);
    }

    /// What a thread of the crew does: encode until the stream has ended.
    fn work(&self) {
        self.lock().at_work += 1;
        let _shift = Shift(self);
        let stop = &self.stop;
        let stopped = || if stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) };
        self.encoder.with_cache(|cache| {
            loop {
                let mut state = self.lock();
                while state.queue.is_empty() && !state.closed {
                    state = self.queued.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                let Some(batch) = state.queue.pop_front() else { break };
                drop(state);
                self.encode(batch, cache, &mut { stopped });
            }
        });
    }

    /// What the calling thread does with a batch that no other is free for.
    fn encode_here(&self, batch: Option<(usize, Vec<T>)>, check: Check) {
        if let Some(batch) = batch {
            self.encoder.with_cache(|cache| self.encode(batch, cache, check));
        }
    }

    /// What the calling thread does at the end: encode all that wait, then wait for the others.
    fn encode_rest(&self, check: Check) {
        loop {
            let batch = self.lock().queue.pop_front();
            if batch.is_none() {
                break;
            }
            self.encode_here(batch, check);
        }
        let mut state = self.lock();
        while state.at_work > 0 {
            state = self.gone.wait_timeout(state, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
            if let Err(error) = check() {
                self.fail(&mut state, error);
            }
        }
    }

    fn encode(&self, (index, texts): (usize, Vec<T>), cache: &mut Cache, check: Check) {
        // The first batch that is not joined yet goes straight to where it belongs.
        let mut state = self.lock();
        let at_its_turn = index == state.joined;
        let mut ids = if at_its_turn { std::mem::take(&mut state.flat) } else { Flat::default() };
        drop(state);
        let outcome = self.encoder.encode_texts(&texts, cache, &mut ids, check);
        let mut state = self.lock();
        state.spent.push(texts);
        if let Err(error) = outcome {
            self.fail(&mut state, error);
        }
        if at_its_turn {
            state.flat = ids;
            state.joined += 1;
        } else {
            state.early.insert(index, ids);
        }
        // While the batch whose turn it is has `flat`, it is not among these.
        while let Some(next) = state.next_in_turn() {
            state.flat.append(&next);
            state.joined += 1;
        }
    }
}

impl<T> Crew<'_, T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
