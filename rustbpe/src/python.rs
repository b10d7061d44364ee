//! The Python module: arguments in, arrays and lists out.
//!
//! Splitting, counting, training, encoding, and decoding of arrays run with the GIL released, and stop at Ctrl-C. What
//! reads or makes objects of Python holds it, and cannot do without: `str` to UTF-8, numbers of a list (decoded as they
//! are read), and the lists, `bytes` and `str` that are returned. An array is copied first, so that nobody changes it.

mod decode;
mod texts;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use numpy::{IntoPyArray, PyArray1, PyArrayMethods};
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};

use self::texts::{Source, Text, text_of, type_name};
use crate::batches::encode_stream;
use crate::encode::{Encoder, Flat};
use crate::error::Error;
use crate::split::{GPT4_PATTERN, Splitter};
use crate::stream::{Limits, count_stream};
use crate::train::train;
use crate::vocab::{NO_ID, Vocab, show, unknown_id};

/// How often a long computation looks for Ctrl-C and reports its progress.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The least bound on memory, in bytes: below it the tables of an empty training would not fit.
const MIN_MEMORY: i64 = 64 << 20;

/// Texts of a training that are handed over at once, if the caller says nothing else.
const BUFFER_SIZE: usize = 8192;

/// Pieces between two looks for Ctrl-C.
const SPLIT_CHECK_EVERY: usize = 1 << 14;

/// What `PyLong_AsUnsignedLong` returns beside an exception; no id is so large.
const WRONG: std::ffi::c_ulong = std::ffi::c_ulong::MAX;

/// Texts and arrays below this many bytes are worked on without releasing the GIL, which costs more than it gives there.
const DETACH_MIN_BYTES: usize = 1 << 12;

/// Threads for each core that a caller may ask for: more bring nothing, and each has a cache of 8 MiB.
const MOST_THREADS_PER_CORE: usize = 4;

/// What stops a call: an error of ours, or a Python exception on its way.
enum Stop {
    Ours(Error),
    Python(PyErr),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Ours(error)
    }
}

impl From<PyErr> for Stop {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl From<Stop> for PyErr {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Ours(error) => PyValueError::new_err(error.to_string()),
            Stop::Python(error) => error,
        }
    }
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Stop::Ours(error).into()
    }
}

/// Ids of all texts end to end, and offsets with one more entry than texts.
type FlatArrays<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<i64>>);

/// Byte-level BPE tokenizer. See `rustbpe.pyi` for the documentation of each method.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer {
    encoder: RwLock<Arc<Encoder>>,
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        Self::build(Vocab::from_merges(&[])?, GPT4_PATTERN)
    }

    #[staticmethod]
    fn from_ranks(ranks: &Bound<'_, PyAny>, pattern: &str) -> PyResult<Self> {
        let tokens = tokens_by_rank(ranks)?;
        let splitter = Splitter::new(pattern)?;
        let vocab = ranks.py().detach(|| Vocab::from_tokens(&tokens))?;
        Ok(Self::wrap(Encoder::new(vocab, splitter)))
    }

    #[pyo3(signature = (iterator, vocab_size, buffer_size=None, pattern=None, num_threads=None, max_memory=None,
        progress=None))]
    #[allow(clippy::too_many_arguments)]
    fn train_from_iterator<'py>(
        &self,
        iterator: &Bound<'py, PyAny>,
        vocab_size: &Bound<'py, PyAny>,
        buffer_size: Option<&Bound<'py, PyAny>>,
        pattern: Option<&str>,
        num_threads: Option<&Bound<'py, PyAny>>,
        max_memory: Option<&Bound<'py, PyAny>>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let merges = merge_count(number("vocab_size", vocab_size)?)?;
        let limits = Limits { threads: thread_count(num_threads)?, max_memory: memory_bound(max_memory)? };
        let splitter = Splitter::new(pattern.unwrap_or(GPT4_PATTERN))?;
        let mut source =
            Source::new(iterator, buffer_size.map_or(Ok(BUFFER_SIZE), |value| positive("buffer_size", value))?)?;
        let pieces = AtomicU64::new(0);
        let mut watch = Watch { progress, signals: Signals::new(), bytes: 0, pieces: &pieces };
        let (vocab, distinct, pruned) = iterator.py().detach(|| -> Result<_, Stop> {
            let (counter, pruned) = count_stream(&splitter, limits, &pieces, || {
                Python::attach(|py| {
                    watch.bytes = source.bytes;
                    watch.look(py, 0)?;
                    source.next_batch(py)
                })
            })?;
            let (distinct, words) = (counter.len(), counter.into_words());
            let found = train(words, merges, |done| watch.check(done));
            watch.signals.raised()?;
            let found = found?;
            Python::attach(|py| watch.tell(py, found.len()))?;
            Ok((Vocab::from_merges(&found)?, distinct, pruned))
        })?;
        *self.encoder.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Encoder::new(vocab, splitter));
        let report = PyDict::new(iterator.py());
        report.set_item("texts", source.texts)?;
        report.set_item("bytes", source.bytes)?;
        report.set_item("pieces", pieces.into_inner())?;
        report.set_item("distinct_pieces", distinct)?;
        report.set_item("prunings", pruned.times)?;
        report.set_item("pruned_pieces", pruned.pieces)?;
        report.set_item("pruned_occurrences", pruned.occurrences)?;
        Ok(report)
    }

    fn encode(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        self.ids_of(py, text)
    }

    fn encode_numpy<'py>(&self, py: Python<'py>, text: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<u32>>> {
        Ok(self.ids_of(py, text)?.into_pyarray(py))
    }

    #[pyo3(signature = (texts, num_threads=None))]
    fn batch_encode<'py>(
        &self,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyList>> {
        let Flat { ids, offsets } = self.flat(texts, num_threads)?;
        let lists = PyList::empty(texts.py());
        for ends in offsets.windows(2) {
            lists.append(PyList::new(texts.py(), &ids[ends[0]..ends[1]])?)?;
        }
        Ok(lists)
    }

    #[pyo3(signature = (texts, num_threads=None))]
    fn encode_batch_numpy<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<FlatArrays<'py>> {
        let Flat { ids, offsets } = self.flat(texts, num_threads)?;
        let offsets: Vec<i64> = offsets.into_iter().map(|offset| offset as i64).collect();
        Ok((ids.into_pyarray(py), offsets.into_pyarray(py)))
    }

    fn decode<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyString>> {
        let bytes = self.bytes_of(ids)?;
        PyString::from_bytes(py, &bytes)
            .or_else(|_| PyString::from_encoded_object(&PyBytes::new(py, &bytes), Some(c"utf-8"), Some(c"replace")))
    }

    fn decode_bytes<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.bytes_of(ids)?))
    }

    fn split<'py>(&self, py: Python<'py>, text: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        let text = text_of(text, || "text".to_owned())?;
        let text = text.as_ref();
        let mut signals = Signals::new();
        let mut ends = Vec::new();
        let push = |_: &[u8], _, end| {
            ends.push(end);
            if ends.len() % SPLIT_CHECK_EVERY == 0 { signals.check() } else { Ok(()) }
        };
        let outcome = py.detach(|| self.encoder().splitter().for_each(text, push));
        signals.raised()?;
        outcome?;
        let starts = std::iter::once(&0).chain(&ends);
        let pieces = PyList::empty(py);
        for (&start, &end) in starts.zip(&ends) {
            pieces.append(&text[start..end])?;
        }
        Ok(pieces)
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder().vocab().len()
    }

    fn get_pattern(&self) -> String {
        self.encoder().splitter().pattern().to_owned()
    }

    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let encoder = self.encoder();
        (0..encoder.vocab().len() as u32).map(|id| (PyBytes::new(py, encoder.vocab().token(id)), id)).collect()
    }

    fn get_merges(&self) -> PyResult<Vec<(u32, u32)>> {
        let encoder = self.encoder();
        let vocab = encoder.vocab();
        (0..vocab.len() as u32)
            .filter(|&id| vocab.token(id).len() > 1)
            .map(|id| match vocab.parts(id) {
                (NO_ID, _) => Err(PyValueError::new_err(format!(
                    "token {id}, {}, is not made by any merge of lower ranks: these ranks are no list of merges",
                    show(vocab.token(id))
                ))),
                parts => Ok(parts),
            })
            .collect()
    }
}

impl Tokenizer {
    fn build(vocab: Vocab, pattern: &str) -> PyResult<Self> {
        Ok(Self::wrap(Encoder::new(vocab, Splitter::new(pattern)?)))
    }

    fn wrap(encoder: Encoder) -> Self {
        Self { encoder: RwLock::new(Arc::new(encoder)) }
    }

    /// The present encoder; a training that ends meanwhile does not disturb who holds this one.
    fn encoder(&self) -> Arc<Encoder> {
        Arc::clone(&self.encoder.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn ids_of(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        let text = text_of(text, || "text".to_owned())?;
        let text = text.as_ref();
        let encoder = self.encoder();
        if text.len() < DETACH_MIN_BYTES {
            return Ok(encoder.encode(text)?);
        }
        let mut signals = Signals::new();
        let ids = py.detach(|| encoder.encode_checked(text, &mut || signals.check()));
        signals.raised()?;
        Ok(ids?)
    }

    /// Ids of all texts end to end, and where each begins; texts are read while those before them are encoded.
    fn flat(&self, texts: &Bound<'_, PyAny>, num_threads: Option<&Bound<'_, PyAny>>) -> PyResult<Flat> {
        let (py, threads) = (texts.py(), thread_count(num_threads)?);
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("texts: expected a list of str, got one str"));
        }
        let encoder = self.encoder();
        let mut texts = texts.try_iter()?.enumerate();
        let next = || -> Result<Option<Text>, Stop> {
            Ok(texts.next().map(|(i, text)| text_of(&text?, || format!("texts[{i}]"))).transpose()?)
        };
        let mut signals = Signals::new();
        let flat = encode_stream(&encoder, threads, next, |work| py.detach(work), &mut || signals.check());
        signals.raised()?;
        Ok(flat?)
    }

    fn bytes_of(&self, ids: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
        let (py, encoder) = (ids.py(), self.encoder());
        let vocab = encoder.vocab();
        if let Ok(list) = ids.cast_exact::<PyList>() {
            if let Ok(bytes) = vocab.decode(numbers_of(list)) {
                return Ok(bytes);
            }
        } else if let Ok(array) = ids.cast::<PyArray1<u32>>() {
            let array = array.readonly();
            if let Some(ids) = array.as_slice().ok().filter(|ids| size_of_val(*ids) < DETACH_MIN_BYTES) {
                return Ok(vocab.decode(ids.iter().copied())?);
            }
            let ids = array.as_array().to_vec(); // without the GIL another thread could write to it meanwhile
            return Ok(py.detach(|| vocab.decode(ids.into_iter()))?);
        }
        let mut list = Vec::with_capacity(ids.len().unwrap_or(0));
        for id in ids.try_iter()? {
            let id = id?;
            list.push(id.extract::<u32>().map_err(|_| not_an_id(&id, vocab.len()))?);
        }
        Ok(vocab.decode(list.into_iter())?)
    }
}

/// The numbers of a list, [`NO_ID`] for whatever is none, which the caller then looks for. Safe calls take 20 ns
/// an item through the stable ABI and `array.array` takes 7; these two take 5, and overlap with the look-up of the token.
#[allow(unsafe_code)]
fn numbers_of(list: &Bound<'_, PyList>) -> impl ExactSizeIterator<Item = u32> {
    (0..list.len()).map(|i| {
        // SAFETY: `list` is a list and we hold the GIL (abi3 knows no Python without), which neither call lets go of: PyList_GetItem checks the index
        // and lends a reference that the list owns; PyLong_AsUnsignedLong runs no Python code, since it takes
        // instances of int only, so the list cannot change while the reference is in use. Null is not passed on. Both
        // report failures as an exception, which is taken back here.
        unsafe {
            let item = ffi::PyList_GetItem(list.as_ptr(), i as ffi::Py_ssize_t);
            let number = if item.is_null() { WRONG } else { ffi::PyLong_AsUnsignedLong(item) };
            if number == WRONG {
                ffi::PyErr_Clear();
            }
            u32::try_from(number).unwrap_or(NO_ID)
        }
    })
}

/// The exception for something that is no id: a wrong type, or a number no vocabulary has.
fn not_an_id(id: &Bound<'_, PyAny>, vocab_size: usize) -> PyErr {
    if id.extract::<i128>().is_ok() {
        PyValueError::new_err(unknown_id(id, vocab_size))
    } else {
        PyTypeError::new_err(format!("token ids must be int, got {}", type_name(id)))
    }
}

/// The integer that was given for `name`; one that no 64 bits hold is as wrong a value as any other.
fn number(name: &str, value: &Bound<'_, PyAny>) -> PyResult<i64> {
    value.extract().map_err(|error: PyErr| {
        if error.is_instance_of::<PyOverflowError>(value.py()) {
            PyValueError::new_err(format!("{name}={value}: it must be less than 2**63, and not below -2**63"))
        } else {
            PyTypeError::new_err(format!("{name}: expected int, got {}", type_name(value)))
        }
    })
}

fn positive(name: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let value = number(name, value)?;
    usize::try_from(value)
        .ok()
        .filter(|&value| value > 0)
        .ok_or_else(|| PyValueError::new_err(format!("{name}={value}: it must be 1 or more")))
}

fn thread_count(num_threads: Option<&Bound<'_, PyAny>>) -> PyResult<usize> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    match num_threads {
        Some(value) => positive("num_threads", value).map(|threads| threads.min(MOST_THREADS_PER_CORE * cores)),
        None => Ok(cores),
    }
}

fn merge_count(vocab_size: i64) -> PyResult<usize> {
    let merges = usize::try_from(vocab_size).ok().and_then(|size| size.checked_sub(256));
    merges.filter(|_| vocab_size < i64::from(u32::MAX)).ok_or_else(|| {
        PyValueError::new_err(format!(
            "vocab_size={vocab_size}: it must be 256 or more (the single bytes), and less than 2**32"
        ))
    })
}

fn memory_bound(max_memory: Option<&Bound<'_, PyAny>>) -> PyResult<Option<u64>> {
    match max_memory.map(|value| number("max_memory", value)).transpose()? {
        Some(bytes) if bytes < MIN_MEMORY => {
            Err(PyValueError::new_err(format!("max_memory={bytes}: it must be {MIN_MEMORY} bytes (64 MiB) or more")))
        }
        bytes => Ok(bytes.map(i64::unsigned_abs)),
    }
}

/// Tokens in order of rank from a dict or an iterable of (bytes, rank).
fn tokens_by_rank(ranks: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<u8>>> {
    let items = match ranks.cast::<PyDict>() {
        Ok(dict) => dict.items().into_any(),
        Err(_) => ranks.clone(),
    };
    let mut pairs = Vec::with_capacity(items.len().unwrap_or(0));
    for item in items.try_iter()? {
        let item = item?;
        let (token, rank): (Vec<u8>, i64) = item.extract().map_err(|_| {
            PyTypeError::new_err(format!("ranks: expected a dict of bytes to int or pairs of them, got {item:?}"))
        })?;
        pairs.push((rank, token));
    }
    pairs.sort_by_key(|&(rank, _)| rank);
    for ((rank, token), expected) in pairs.iter().zip(0i64..) {
        if *rank != expected {
            let what = if *rank < expected { "is there twice or negative" } else { "leaves a gap" };
            return Err(PyValueError::new_err(format!(
                "ranks: rank {rank} of {} {what}; expected each of 0..{} once",
                show(token),
                pairs.len()
            )));
        }
    }
    Ok(pairs.into_iter().map(|(_, token)| token).collect())
}

/// Looks for Ctrl-C now and then from inside a computation that has released the GIL.
struct Signals {
    last: Instant,
    raised: Option<PyErr>,
}

impl Signals {
    fn new() -> Self {
        Self { last: Instant::now(), raised: None }
    }

    /// Whether it is time to look again.
    fn due(&mut self) -> bool {
        let due = self.last.elapsed() >= LOOK_EVERY;
        if due {
            self.last = Instant::now();
        }
        due
    }

    fn check(&mut self) -> Result<(), Error> {
        if self.due() { Python::attach(|py| self.keep(py.check_signals())) } else { Ok(()) }
    }

    /// An exception stops the computation, which knows nothing of Python, and waits here.
    fn keep(&mut self, outcome: PyResult<()>) -> Result<(), Error> {
        outcome.map_err(|error| {
            self.raised = Some(error);
            Error::Interrupted
        })
    }

    /// The exception that has stopped the computation, if one has.
    fn raised(&mut self) -> PyResult<()> {
        self.raised.take().map_or(Ok(()), Err)
    }
}

/// Looks for Ctrl-C in a training, and reports its progress.
struct Watch<'a> {
    /// `progress(bytes read, pieces counted, merges done)`, if there is one.
    progress: Option<Py<PyAny>>,
    signals: Signals,
    bytes: usize,
    pieces: &'a AtomicU64,
}

impl Watch<'_> {
    fn tell(&self, py: Python<'_>, merges: usize) -> PyResult<()> {
        py.check_signals()?;
        if let Some(progress) = &self.progress {
            progress.call1(py, (self.bytes, self.pieces.load(Ordering::Relaxed), merges))?;
        }
        Ok(())
    }

    fn look(&mut self, py: Python<'_>, merges: usize) -> PyResult<()> {
        if self.signals.due() { self.tell(py, merges) } else { py.check_signals() }
    }

    fn check(&mut self, merges: usize) -> Result<(), Error> {
        if !self.signals.due() {
            return Ok(());
        }
        let outcome = Python::attach(|py| self.tell(py, merges));
        self.signals.keep(outcome)
    }
}

/// Byte-level BPE: a parallel trainer and an encoder whose ids equal tiktoken's.
#[pymodule]
#[pyo3(name = "rustbpe")]
mod module {
    #[pymodule_export]
    use super::{Tokenizer, decode::DecodeStep};
}
