//! The decode step for Python: weights in at the beginning, then ids and the arrays of a cache at each step.

use numpy::{Element, PyArray2, PyArray4, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::decode::{Layer, Model, Precision, Row, Stored};

/// Weights of a layer: queries, keys and values, out, up, down, the gate's, and its table of values.
type LayerArrays<'py> = (
    PyReadonlyArray2<'py, f32>,
    PyReadonlyArray2<'py, f32>,
    PyReadonlyArray2<'py, f32>,
    PyReadonlyArray2<'py, f32>,
    Option<PyReadonlyArray2<'py, f32>>,
    Option<Table>,
);

/// One new position of each of some rows through a model. See `rustbpe.pyi` for the documentation.
#[pyclass(frozen, module = "rustbpe")]
pub struct DecodeStep {
    model: Model,
    /// Whether what the tables hold is rounded to bf16 where it is read.
    rounds: bool,
    embeddings: Table,
    tables: Vec<Option<Table>>,
}

/// A table of embeddings, where the model has it: fp32, or bf16 as its bits.
#[derive(FromPyObject)]
enum Table {
    Full(Py<PyArray2<f32>>),
    Half(Py<PyArray2<u16>>),
}

#[pymethods]
impl DecodeStep {
    #[new]
    #[pyo3(signature = (*, precision, rounds, layers, windows, mix, head, vocabulary, embeddings, heads, kv_heads, cos, sin,
        smear_gate, smear_scale, backout_scale, gate_scale, scale, softcap))]
    #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
    fn new(
        precision: &str,
        rounds: bool,
        layers: Vec<LayerArrays<'_>>,
        windows: Vec<usize>,
        mix: Vec<[f32; 2]>,
        head: PyReadonlyArray2<'_, f32>,
        vocabulary: usize,
        embeddings: Table,
        heads: usize,
        kv_heads: usize,
        cos: PyReadonlyArray2<'_, f32>,
        sin: PyReadonlyArray2<'_, f32>,
        smear_gate: PyReadonlyArray1<'_, f32>,
        smear_scale: f32,
        backout_scale: f32,
        gate_scale: f32,
        scale: f32,
        softcap: f32,
    ) -> PyResult<Self> {
        let precision = match precision {
            "fp32" => Precision::Full,
            "bf16" => Precision::Half,
            "int8" => Precision::Quarter,
            other => return Err(PyValueError::new_err(format!("no precision {other:?}: fp32, bf16 or int8"))),
        };
        let ([rows, width], head_dim) = (embeddings.shape(cos.py()), 2 * cos.shape()[1]);
        let pack = |weight: &PyReadonlyArray2<'_, f32>, inputs: usize| {
            let columns = weight.shape()[1];
            require(columns == inputs, || format!("a weight of {columns} columns, where {inputs} are read"))?;
            Ok::<_, PyErr>(crate::decode::Matrix::pack(slice(weight)?, inputs, precision))
        };
        let sizes = [layers.len(), windows.len(), mix.len(), heads, kv_heads, head_dim, width, rows];
        require(!sizes.contains(&0), || format!("sizes of 0: {sizes:?}"))?;
        require(heads.is_multiple_of(kv_heads) && windows.len() == layers.len() && mix.len() == layers.len(), || {
            format!("sizes that do not fit: {sizes:?}")
        })?;
        let (mut packed, mut tables) = (Vec::new(), Vec::new());
        for (((qkv, out, up, down, gate, table), window), mix) in layers.into_iter().zip(windows).zip(mix) {
            let rows = [qkv.shape()[0], out.shape()[0], down.shape()[0], up.shape()[0]];
            let right = [(heads + 2 * kv_heads) * head_dim, width, width, 4 * width];
            require(rows == right, || format!("weights of {rows:?} rows, where {right:?} are written"))?;
            require(gate.is_some() == table.is_some(), || "a table of values and its gate come together".into())?;
            let gate = gate.as_ref().map_or(Ok(Vec::new()), |gate| slice(gate).map(<[f32]>::to_vec))?;
            require(gate.len().is_multiple_of(kv_heads), || "a gate of other heads".into())?;
            packed.push(Layer {
                qkv: pack(&qkv, width)?,
                out: pack(&out, heads * head_dim)?,
                up: pack(&up, width)?,
                down: pack(&down, 4 * width)?,
                gate,
                window,
                mix,
            });
            tables.push(table);
        }
        require(head.shape()[0] >= vocabulary && cos.shape() == sin.shape(), || "a head or angles too few".into())?;
        let model = Model {
            layers: packed,
            head: pack(&head, width)?,
            vocabulary,
            width,
            heads,
            kv_heads,
            head_dim,
            rotary: [slice(&cos)?.to_vec(), slice(&sin)?.to_vec()],
            smear_gate: smear_gate.as_slice()?.to_vec(),
            smear_scale,
            backout_scale,
            gate_scale,
            scale,
            softcap,
        };
        Ok(Self { model, rounds, embeddings, tables })
    }

    #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)]
    fn step(
        &self,
        ids: Vec<usize>,
        before: Vec<Option<usize>>,
        rows: Vec<usize>,
        lengths: Vec<usize>,
        keys: Bound<'_, PyAny>,
        values: Bound<'_, PyAny>,
        logits: Bound<'_, PyArray2<f32>>,
        threads: usize,
    ) -> PyResult<()> {
        let step = (ids, before, rows, lengths);
        if let Ok(keys) = keys.cast::<PyArray4<u16>>() {
            return self.step_of(step, keys, values.cast()?, &logits, threads);
        }
        self.step_of::<f32>(step, keys.cast()?, values.cast()?, &logits, threads)
    }
}

/// New ids, those before them, rows and lengths.
type Step = (Vec<usize>, Vec<Option<usize>>, Vec<usize>, Vec<usize>);

impl DecodeStep {
    fn step_of<K: Stored + Element>(
        &self,
        (ids, before, rows, lengths): Step,
        keys: &Bound<'_, PyArray4<K>>,
        values: &Bound<'_, PyArray4<K>>,
        logits: &Bound<'_, PyArray2<f32>>,
        threads: usize,
    ) -> PyResult<()> {
        let py = keys.py();
        let model = &self.model;
        let [layers, slots, capacity, width]: [usize; 4] = keys.shape().try_into().expect("four dimensions");
        require(values.shape() == keys.shape() && width == model.kv_heads * model.head_dim, || {
            "keys and values of another model".into()
        })?;
        let counts = [ids.len(), before.len(), rows.len(), lengths.len(), logits.shape()[0]];
        require(counts.iter().all(|count| *count == counts[0]) && counts[0] > 0, || format!("{counts:?} rows"))?;
        require(logits.shape()[1] == model.vocabulary && layers == model.layers.len(), || "another model".into())?;
        let positions = model.rotary[0].len() / (model.head_dim / 2);
        require(lengths.iter().all(|length| *length < capacity.min(positions)), || "a row is full".into())?;
        require(rows.iter().all(|row| *row < slots), || "no such row".into())?;
        let (mut keys, mut values, mut logits) = (keys.readwrite(), values.readwrite(), logits.readwrite());
        let at = |layer: usize, row: usize| (layer * slots + rows[row]) * capacity * width;
        let added = {
            let (stored_keys, stored_values) = (keys.as_slice()?, values.as_slice()?);
            let mut inputs = Vec::with_capacity(ids.len());
            for row in 0..ids.len() {
                let of = |layer: usize| at(layer, row)..at(layer, row) + lengths[row] * width;
                inputs.push(Row {
                    token: self.embedded(py, &self.embeddings, ids[row])?,
                    before: before[row].map(|id| self.embedded(py, &self.embeddings, id)).transpose()?,
                    values: self
                        .tables
                        .iter()
                        .map(|table| table.as_ref().map_or(Ok(Vec::new()), |table| self.embedded(py, table, ids[row])))
                        .collect::<PyResult<_>>()?,
                    stored_keys: (0..layers).map(|layer| &stored_keys[of(layer)]).collect(),
                    stored_values: (0..layers).map(|layer| &stored_values[of(layer)]).collect(),
                    position: lengths[row],
                });
            }
            let mut lines: Vec<&mut [f32]> = logits.as_slice_mut()?.chunks_exact_mut(model.vocabulary).collect();
            py.detach(|| model.step(&inputs, threads, &mut lines))
        };
        let (all_keys, all_values) = (keys.as_slice_mut()?, values.as_slice_mut()?);
        for (layer, [new_keys, new_values]) in added.iter().enumerate() {
            for (row, length) in lengths.iter().enumerate() {
                let place = at(layer, row) + length * width..at(layer, row) + (length + 1) * width;
                all_keys[place.clone()].copy_from_slice(&new_keys[row * width..][..width]);
                all_values[place].copy_from_slice(&new_values[row * width..][..width]);
            }
        }
        Ok(())
    }

    /// A row of a table, as the model reads it.
    fn embedded(&self, py: Python<'_>, table: &Table, id: usize) -> PyResult<Vec<f32>> {
        let [rows, width] = table.shape(py);
        require(id < rows, || format!("id {id} is not in a table of {rows} rows"))?;
        let place = id * width..(id + 1) * width;
        let row: Vec<f32> = match table {
            Table::Full(numbers) => numbers.bind(py).readonly().as_slice()?[place].to_vec(),
            Table::Half(bits) => bits.bind(py).readonly().as_slice()?[place].iter().map(|bits| bits.value()).collect(),
        };
        Ok(if self.rounds { row.into_iter().map(|number| u16::of(number).value()).collect() } else { row })
    }
}

impl Table {
    fn shape(&self, py: Python<'_>) -> [usize; 2] {
        let shape = match self {
            Self::Full(numbers) => numbers.bind(py).shape(),
            Self::Half(bits) => bits.bind(py).shape(),
        };
        [shape[0], shape[1]]
    }
}

fn slice<'a, T: Element>(array: &'a PyReadonlyArray2<'_, T>) -> PyResult<&'a [T]> {
    Ok(array.as_slice()?)
}

fn require(holds: bool, message: impl FnOnce() -> String) -> PyResult<()> {
    if holds { Ok(()) } else { Err(PyValueError::new_err(message())) }
}
