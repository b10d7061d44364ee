//! Which two ids merge into which: the table that merging asks all the time, and mostly in vain.

use crate::vocab::NO_ID;

/// Bits of the filter for each slot of the table; with half the slots taken, 3 in 100 absent pairs pass it.
const FILTER_BITS_PER_SLOT: usize = 8;

/// Open addressing, at most half full, behind a filter of bits that is small enough to stay in a core's own cache.
pub struct PairTable {
    slots: Vec<[u32; 3]>,
    filter: Vec<u64>,
    len: usize,
    /// What two bytes merge into, by their values: the first look-ups of every piece.
    bytes: Vec<u32>,
}

impl PairTable {
    /// An empty table.
    pub fn new() -> Self {
        let mut table = Self { slots: Vec::new(), filter: Vec::new(), len: 0, bytes: vec![NO_ID; 1 << 16] };
        table.clear(1 << 10);
        table
    }

    fn clear(&mut self, slots: usize) {
        self.slots = vec![[NO_ID; 3]; slots];
        self.filter = vec![0; slots * FILTER_BITS_PER_SLOT / 64];
        self.len = 0;
    }

    #[inline]
    fn hash(left: u32, right: u32) -> u64 {
        let product = (u64::from(left) << 32 | u64::from(right)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        product ^ product >> 32
    }

    #[inline]
    fn filter_bit(&self, hash: u64) -> (usize, u64) {
        ((hash >> 6) as usize & (self.filter.len() - 1), 1 << (hash & 63))
    }

    /// Adds a pair that is not there yet.
    pub fn insert(&mut self, left: u32, right: u32, id: u32) {
        if (self.len + 1) * 2 > self.slots.len() {
            let old = std::mem::take(&mut self.slots);
            self.clear(old.len() * 2);
            old.into_iter().filter(|slot| slot[2] != NO_ID).for_each(|[l, r, id]| self.place(l, r, id));
        }
        self.place(left, right, id);
    }

    fn place(&mut self, left: u32, right: u32, id: u32) {
        let hash = Self::hash(left, right);
        let (word, bit) = self.filter_bit(hash);
        self.filter[word] |= bit;
        let mask = self.slots.len() - 1;
        let mut slot = (hash >> 20) as usize & mask;
        while self.slots[slot][2] != NO_ID {
            slot = (slot + 1) & mask;
        }
        self.slots[slot] = [left, right, id];
        self.len += 1;
    }

    /// What `left right` merge into, or [`NO_ID`].
    #[inline]
    pub fn get(&self, left: u32, right: u32) -> u32 {
        let hash = Self::hash(left, right);
        let (word, bit) = self.filter_bit(hash);
        if self.filter[word] & bit == 0 {
            return NO_ID;
        }
        let mask = self.slots.len() - 1;
        let mut slot = (hash >> 20) as usize & mask;
        loop {
            let [l, r, id] = self.slots[slot];
            if (l, r) == (left, right) || id == NO_ID {
                return id;
            }
            slot = (slot + 1) & mask;
        }
    }

    /// Says what two bytes merge into.
    pub fn insert_bytes(&mut self, left: u8, right: u8, id: u32) {
        self.bytes[usize::from(left) << 8 | usize::from(right)] = id;
    }

    /// What two bytes merge into, or [`NO_ID`].
    #[inline]
    pub fn of_bytes(&self, left: u8, right: u8) -> u32 {
        self.bytes[usize::from(left) << 8 | usize::from(right)]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn it_agrees_with_a_plain_map() {
        let mut table = PairTable::new();
        let mut plain = HashMap::new();
        for i in 0..20_000u32 {
            let pair = (i.wrapping_mul(2_654_435_761) % 300, i / 7);
            if plain.insert(pair, i).is_none() {
                table.insert(pair.0, pair.1, i);
            } else {
                plain.insert(pair, table.get(pair.0, pair.1));
            }
        }
        for left in 0..310 {
            for right in (0..2900).step_by(3) {
                assert_eq!(table.get(left, right), plain.get(&(left, right)).copied().unwrap_or(NO_ID));
            }
        }
    }
}
