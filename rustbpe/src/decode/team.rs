//! Threads that compute the parts of a result, and then all have all of it.
//!
//! A decode step has some twenty such results, each of some microseconds, so whoever is ready waits awake; only where
//! that takes long, because the processor does something else, is it given away.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};

/// Looks at the others before a thread gives the processor away, some 20 microseconds.
const LOOKS: usize = 4000;

/// What the threads of a step share.
pub struct Team {
    size: usize,
    arrived: AtomicUsize,
    // Two sets, in turn: while the slowest still reads a result, the next may be written already.
    parts: [Vec<RwLock<Vec<f32>>>; 2],
}

/// One thread of a team.
pub struct Member<'a> {
    team: &'a Team,
    rank: usize,
    turn: usize,
}

impl Team {
    /// A team of `size` threads.
    pub fn new(size: usize) -> Self {
        let parts = || (0..size).map(|_| RwLock::default()).collect();
        Self { size, arrived: AtomicUsize::new(0), parts: [parts(), parts()] }
    }

    /// Its thread number `rank`.
    pub fn member(&self, rank: usize) -> Member<'_> {
        Member { team: self, rank, turn: 0 }
    }
}

/// The share of thread `rank` in `count` units.
pub fn share(count: usize, size: usize, rank: usize) -> Range<usize> {
    count * rank / size..count * (rank + 1) / size
}

impl Member<'_> {
    /// This thread's share in `count` units.
    pub fn share(&self, count: usize) -> Range<usize> {
        share(count, self.team.size, self.rank)
    }

    /// Computes this thread's share of `count` units with `work`, and hands every share to `take`.
    pub fn gather(
        &mut self,
        count: usize,
        work: impl FnOnce(Range<usize>, &mut Vec<f32>),
        mut take: impl FnMut(Range<usize>, &[f32]),
    ) {
        let parts = &self.team.parts[self.turn % 2];
        // A poisoned part is that of a thread that has panicked, which ends the step in any case.
        work(self.share(count), &mut parts[self.rank].write().unwrap_or_else(PoisonError::into_inner));
        self.wait();
        for (rank, part) in parts.iter().enumerate() {
            take(share(count, self.team.size, rank), &part.read().unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn wait(&mut self) {
        self.turn += 1;
        self.team.arrived.fetch_add(1, Ordering::AcqRel);
        let mut looks = 0;
        while self.team.arrived.load(Ordering::Acquire) < self.turn * self.team.size {
            looks += 1;
            if looks < LOOKS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

impl Drop for Member<'_> {
    /// Nobody waits for a thread that has panicked.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.team.arrived.store(usize::MAX / 2, Ordering::Release);
        }
    }
}
