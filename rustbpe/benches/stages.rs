//! Throughput of each stage on this crate's own sources: `cargo bench`.

// criterion's macro makes a public function without documentation.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::atomic::AtomicU64;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use rustbpe::count::PieceCounter;
use rustbpe::encode::Encoder;
use rustbpe::error::Error;
use rustbpe::split::{GPT4_PATTERN, Splitter};
use rustbpe::stream::{Limits, count_stream};
use rustbpe::train::train;
use rustbpe::vocab::Vocab;

const MERGES: usize = 2000;

fn source() -> String {
    [
        include_str!("../src/split.rs"),
        include_str!("../src/train.rs"),
        include_str!("../src/encode.rs"),
        include_str!("../src/vocab.rs"),
        include_str!("../README.md"),
    ]
    .concat()
}

fn splitter() -> Splitter {
    Splitter::new(GPT4_PATTERN).expect("the pattern is a constant that compiles")
}

fn counted(text: &str) -> PieceCounter {
    let mut counter = PieceCounter::default();
    counter.count_text(&splitter(), text).expect("this pattern fails on no text");
    counter
}

fn training(c: &mut Criterion) {
    let text = source();
    let splitter = splitter();
    let mut group = c.benchmark_group("train");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("split", |b| {
        b.iter(|| {
            let mut pieces = 0;
            let add = |_: &[u8], start, end| {
                pieces += black_box(end - start);
                Ok(())
            };
            splitter.for_each(&text, add).expect("as above");
            pieces
        });
    });
    group.bench_function("count", |b| b.iter(|| counted(black_box(&text))));
    group.bench_function("count on two threads", |b| {
        b.iter(|| {
            let mut batches = (0..8).map(|_| vec![text.as_str()]);
            let limits = Limits { threads: 2, max_memory: None };
            count_stream::<_, Error>(&splitter, limits, &AtomicU64::new(0), || Ok(batches.next())).expect("as above")
        });
    });
    group.bench_function("merge", |b| {
        b.iter_batched(
            || counted(&text).into_words(),
            |words| train(words, MERGES, |_| Ok(())).expect("nobody stops it"),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

fn coding(c: &mut Criterion) {
    let text = source();
    let merges = train(counted(&text).into_words(), MERGES, |_| Ok(())).expect("nobody stops it");
    let vocab = Vocab::from_merges(&merges).expect("training made them");
    let encoder = Encoder::new(vocab, splitter());
    let ids = encoder.encode(&text).expect("it is short");
    let run = "a".repeat(1 << 20);
    let mut group = c.benchmark_group("code");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("encode", |b| b.iter(|| encoder.encode(black_box(&text))));
    group.bench_function("decode", |b| b.iter(|| encoder.vocab().decode(black_box(&ids).iter().copied())));
    group.throughput(Throughput::Bytes(run.len() as u64));
    group.bench_function("encode a run of one letter", |b| b.iter(|| encoder.encode(black_box(&run))));
    group.finish();
}

criterion_group!(stages, training, coding);
criterion_main!(stages);
