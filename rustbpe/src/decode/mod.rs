//! The decode step: one new position of each of some rows through the whole model, on a processor.
//!
//! The mathematics is that of `nanochat/model/gpt.py`, which says what each name means; here are no graphs, no
//! gradients and no dispatch, so a small model runs at the speed at which its weights are read. Sums are fp32 and their
//! order does not depend on what is beside a row, so a row's result is the same in any company.

// A loop becomes the vector instructions of the function that it ends up in, so it must end up there.
#![allow(clippy::inline_always)]
// Lengths of rows, as a divisor: far below what fp32 holds exactly.
#![allow(clippy::cast_precision_loss)]

mod kernels;
mod matrix;
mod team;

use std::ops::Range;
use std::thread;

pub use self::matrix::{LANES, Matrix, Precision, Stored};
use self::team::{Member, Team, share};

/// Multiplications that a thread more is worth: it takes some 20 microseconds to begin.
const WORK: usize = 1 << 21;

/// The epsilon of RMS norms: fp32's own.
const NORM_EPS: f32 = f32::EPSILON;

/// A layer's weights.
pub struct Layer {
    /// Queries, keys and values, one below the other.
    pub qkv: Matrix,
    /// Heads to the stream.
    pub out: Matrix,
    /// To the hidden width.
    pub up: Matrix,
    /// From the hidden width.
    pub down: Matrix,
    /// (Hkv, channels) of the gate of value embeddings; nothing where the layer has none.
    pub gate: Vec<f32>,
    /// Earlier positions that a query sees.
    pub window: usize,
    /// Factors of the stream and of its first state.
    pub mix: [f32; 2],
}

/// Shape, constants and weights, but for the tables.
pub struct Model {
    /// In order.
    pub layers: Vec<Layer>,
    /// To the vocabulary.
    pub head: Matrix,
    /// Tokens.
    pub vocabulary: usize,
    /// C.
    pub width: usize,
    /// H.
    pub heads: usize,
    /// Hkv.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Cosines and sines of the rotary angles, (positions, D / 2) each.
    pub rotary: [Vec<f32>; 2],
    /// Of the smear gate.
    pub smear_gate: Vec<f32>,
    /// Its factor.
    pub smear_scale: f32,
    /// Factor of the middle layer's stream.
    pub backout_scale: f32,
    /// Factor of the value gates.
    pub gate_scale: f32,
    /// Factor of the scores.
    pub scale: f32,
    /// Of the logits.
    pub softcap: f32,
}

/// A row: its new token, and what it stores.
pub struct Row<'a, K> {
    /// (C) embedding of the token.
    pub token: Vec<f32>,
    /// That of the token before, if there is one.
    pub before: Option<Vec<f32>>,
    /// (Hkv * D) value embeddings, by layer; nothing where a layer has none.
    pub values: Vec<Vec<f32>>,
    /// (length, Hkv * D) keys, by layer.
    pub stored_keys: Vec<&'a [K]>,
    /// Likewise values.
    pub stored_values: Vec<&'a [K]>,
    /// The length.
    pub position: usize,
}

/// What a step adds to the cache: (rows, Hkv * D) keys and values of each layer.
pub type Added<K> = Vec<[Vec<K>; 2]>;

impl Model {
    /// Runs one step of at most `threads` threads; `logits` has (V) of each row.
    pub fn step<K: Stored>(&self, rows: &[Row<K>], threads: usize, logits: &mut [&mut [f32]]) -> Added<K> {
        let size = threads.min(self.work() * rows.len() / WORK).max(1);
        let team = Team::new(size);
        let mut columns = self.columns(size, logits).into_iter();
        let own = columns.next().unwrap_or_default();
        thread::scope(|scope| {
            for (rank, part) in (1..).zip(columns) {
                let member = team.member(rank);
                scope.spawn(move || self.pass(rows, member, part));
            }
            self.pass(rows, team.member(0), own)
        })
    }

    /// Multiplications of a row.
    fn work(&self) -> usize {
        let of = |matrix: &Matrix| matrix.inputs * matrix.width();
        let blocks = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.out, &layer.up, &layer.down]);
        blocks.chain([&self.head]).map(of).sum()
    }

    /// The logits that each thread writes, by row.
    fn columns<'l>(&self, size: usize, logits: &'l mut [&mut [f32]]) -> Vec<Vec<&'l mut [f32]>> {
        let mut rest: Vec<&mut [f32]> = logits.iter_mut().map(|row| &mut **row).collect();
        let mut columns = Vec::new();
        for rank in 0..size {
            let width = share(self.head.count(), size, rank).len() * LANES;
            let (own, after) =
                rest.into_iter().map(|row| row.split_at_mut(width.min(row.len()))).collect::<(Vec<_>, Vec<_>)>();
            columns.push(own);
            rest = after;
        }
        columns
    }

    /// What every thread does: shares of the products and of attention, and all of the rest.
    fn pass<K: Stored>(&self, rows: &[Row<K>], mut member: Member, logits: Vec<&mut [f32]>) -> Added<K> {
        let mut x: Vec<f32> = rows.iter().flat_map(|row| self.smeared(row)).collect();
        let first = x.clone();
        let (mut middle, mut added) = (Vec::new(), Vec::new());
        let (mut normed, mut qkv, mut wide) = (Vec::new(), Vec::new(), Vec::new());
        let (mut heads, mut back) = (Vec::new(), Vec::new());
        for (i, layer) in self.layers.iter().enumerate() {
            for (x, first) in x.iter_mut().zip(&first) {
                *x = layer.mix[0] * *x + layer.mix[1] * first;
            }
            norm_rows(&x, self.width, &mut normed);
            product(&mut member, &layer.qkv, &normed, &mut qkv, |_| ());
            let (queries, new) = self.turned(layer, i, rows, &normed, &qkv);
            self.attention(layer, i, rows, &mut member, &queries, &new, &mut heads);
            added.push(new);
            product(&mut member, &layer.out, &heads, &mut back, |_| ());
            add_rows(&mut x, self.width, &back);
            norm_rows(&x, self.width, &mut normed);
            product(&mut member, &layer.up, &normed, &mut wide, relu_squared);
            product(&mut member, &layer.down, &wide, &mut back, |_| ());
            add_rows(&mut x, self.width, &back);
            if i == self.layers.len() / 2 {
                middle.clone_from(&x);
            }
        }
        for (x, middle) in x.iter_mut().zip(&middle) {
            *x -= self.backout_scale * middle;
        }
        norm_rows(&x, self.width, &mut normed);
        let tiles = member.share(self.head.count());
        let width = tiles.len() * LANES;
        let mut part = vec![0.0; width * rows.len()];
        kernels::product(&self.head, tiles, &normed, &mut part);
        for (row, found) in logits.into_iter().zip(part.chunks_exact(width.max(1))) {
            row.copy_from_slice(&found[..row.len()]);
            kernels::softcap(row, self.softcap);
        }
        added
    }

    /// The normed embedding of a row's token, with its share of that of the token before.
    fn smeared<K>(&self, row: &Row<K>) -> Vec<f32> {
        let mut x = row.token.clone();
        norm(&mut x);
        if let Some(before) = &row.before {
            let mut before = before.clone();
            norm(&mut before);
            let gate = self.smear_scale * sigmoid(dot(&self.smear_gate, &x));
            for (x, before) in x.iter_mut().zip(before) {
                *x += gate * before;
            }
        }
        x
    }

    /// Turned and normed queries (rows, H * D), and the new keys and values (rows, Hkv * D).
    fn turned<K: Stored>(
        &self,
        layer: &Layer,
        i: usize,
        rows: &[Row<K>],
        normed: &[f32],
        qkv: &[f32],
    ) -> (Vec<f32>, [Vec<K>; 2]) {
        let (dim, kv_width) = (self.head_dim, self.kv_heads * self.head_dim);
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for ((row, normed), qkv) in
            rows.iter().zip(normed.chunks_exact(self.width)).zip(qkv.chunks_exact(layer.qkv.width()))
        {
            let (q, kv) = qkv.split_at(self.heads * dim);
            let (k, v) = kv.split_at(kv_width);
            for (parts, into) in [(q, &mut queries), (k, &mut keys)] {
                for part in parts.chunks_exact(dim) {
                    into.extend(self.rotated(part, row.position));
                }
            }
            let begin = values.len();
            values.extend_from_slice(&v[..kv_width]);
            let channels = layer.gate.len() / self.kv_heads;
            for (head, embedded) in row.values[i].chunks_exact(dim).enumerate() {
                let gate = self.gate_scale * sigmoid(dot(&layer.gate[head * channels..][..channels], normed));
                for (value, embedded) in values[begin + head * dim..].iter_mut().zip(embedded) {
                    *value += gate * embedded;
                }
            }
        }
        (queries, [keys, values].map(|numbers| numbers.into_iter().map(K::of).collect()))
    }

    /// A query or key at its position: channel i turns with channel i + D / 2, and then comes the norm.
    fn rotated(&self, part: &[f32], position: usize) -> Vec<f32> {
        let half = self.head_dim / 2;
        let [cos, sin] = self.rotary.each_ref().map(|table| &table[position * half..][..half]);
        let (a, b) = part.split_at(half);
        let pairs = || a.iter().zip(b).zip(cos.iter().zip(sin));
        let mut turned: Vec<f32> = pairs().map(|((a, b), (cos, sin))| a * cos + b * sin).collect();
        turned.extend(pairs().map(|((a, b), (cos, sin))| b * cos - a * sin));
        norm(&mut turned);
        turned
    }

    /// (rows, H * D) attention of the new positions; a unit of work is a head of a row.
    #[allow(clippy::too_many_arguments)]
    fn attention<K: Stored>(
        &self,
        layer: &Layer,
        i: usize,
        rows: &[Row<K>],
        member: &mut Member,
        queries: &[f32],
        new: &[Vec<K>; 2],
        heads: &mut Vec<f32>,
    ) {
        let (dim, kv_width, group) = (self.head_dim, self.kv_heads * self.head_dim, self.heads / self.kv_heads);
        heads.resize(queries.len(), 0.0);
        let work = |units: Range<usize>, part: &mut Vec<f32>| {
            part.resize(units.len() * dim, 0.0);
            for (unit, out) in units.zip(part.chunks_exact_mut(dim)) {
                let (row, at) = (unit / self.heads, unit % self.heads / group * dim);
                let first = rows[row].position.saturating_sub(layer.window);
                let keys = seen_by(rows[row].stored_keys[i], &new[0][row * kv_width..], first, kv_width, at, dim);
                let values = seen_by(rows[row].stored_values[i], &new[1][row * kv_width..], first, kv_width, at, dim);
                kernels::attend(&queries[unit * dim..][..dim], self.scale, &keys, &values, out);
            }
        };
        member.gather(rows.len() * self.heads, work, |units, part| {
            heads[units.start * dim..units.end * dim].copy_from_slice(&part[..units.len() * dim]);
        });
    }
}

/// The keys or values of one head that a query sees: the stored ones from `first` on, and the new one.
fn seen_by<'a, K>(stored: &'a [K], new: &'a [K], first: usize, kv_width: usize, at: usize, dim: usize) -> Vec<&'a [K]> {
    let earlier = stored.chunks_exact(kv_width).skip(first);
    earlier.chain([&new[..kv_width]]).map(|position| &position[at..at + dim]).collect()
}

/// Products of all rows with a matrix, each part finished by `finish`: `out` is (rows, width of the matrix).
fn product(member: &mut Member, matrix: &Matrix, x: &[f32], out: &mut Vec<f32>, finish: fn(&mut [f32])) {
    let rows = x.len() / matrix.inputs;
    out.resize(rows * matrix.width(), 0.0);
    let work = |tiles: Range<usize>, part: &mut Vec<f32>| {
        part.resize(rows * tiles.len() * LANES, 0.0);
        kernels::product(matrix, tiles, x, part);
        finish(part);
    };
    member.gather(matrix.count(), work, |tiles, part| {
        let width = tiles.len() * LANES;
        for row in 0..rows {
            out[row * matrix.width() + tiles.start * LANES..][..width].copy_from_slice(&part[row * width..][..width]);
        }
    });
}

/// Adds the first columns of rows to the stream.
fn add_rows(x: &mut [f32], width: usize, added: &[f32]) {
    let rows = x.len() / width;
    for (x, added) in x.chunks_exact_mut(width).zip(added.chunks_exact(added.len() / rows)) {
        for (x, added) in x.iter_mut().zip(added) {
            *x += added;
        }
    }
}

fn norm_rows(x: &[f32], width: usize, normed: &mut Vec<f32>) {
    normed.clear();
    normed.extend_from_slice(x);
    normed.chunks_exact_mut(width).for_each(norm);
}

/// RMS norm, in place.
fn norm(x: &mut [f32]) {
    let mean = dot(x, x) / x.len() as f32;
    let factor = (mean + NORM_EPS).sqrt().recip();
    for x in x {
        *x *= factor;
    }
}

fn relu_squared(numbers: &mut [f32]) {
    for number in numbers {
        let kept = number.max(0.0);
        *number = kept * kept;
    }
}

/// The dot product of two vectors, as far as the shorter reaches, in eight sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; 8];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        sums[i % 8] += a * b;
    }
    sums.iter().sum()
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
