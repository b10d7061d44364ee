//! The vocabulary: bytes of each id, the id of a string of bytes, and which two ids make which.

use hashbrown::HashTable;

use crate::error::{Error, Result};
use crate::key::{Key, MAX_SHORT, hash, hash_bytes};
use crate::merge::merge_piece;
use crate::pairs::PairTable;

/// "No id": larger than any id.
pub const NO_ID: u32 = u32::MAX;

/// A free slot of the table of short tokens, which hold the two halves of a [`Key`], never zero, and the id.
const FREE: [u64; 3] = [0; 3];

/// The bytes of a token of up to 15 bytes, and in the last byte their number; [`LONG`] there for a longer one.
type Head = [u8; MAX_SHORT + 1];

const LONG: u8 = u8::MAX;

fn head_of(token: &[u8]) -> Head {
    let mut head = [0; MAX_SHORT + 1];
    head[MAX_SHORT] = LONG;
    if token.len() <= MAX_SHORT {
        head[..token.len()].copy_from_slice(token);
        head[MAX_SHORT] = token.len() as u8;
    }
    head
}

/// Ids `0..len`, each with its bytes.
pub struct Vocab {
    bytes: Vec<u8>,
    starts: Vec<u32>,
    byte_ids: [u32; 256],
    pairs: PairTable,
    parts: Vec<(u32, u32)>,
    monotone: bool,
    heads: Vec<Head>,
    short: Vec<[u64; 3]>,
    filter: Vec<u64>,
    long: HashTable<u32>,
}

impl Vocab {
    /// The vocabulary of bytes `0..=255` and merges `256..`.
    ///
    /// # Errors
    /// A merge of ids that do not exist yet, or one whose bytes are taken.
    pub fn from_merges(merges: &[(u32, u32)]) -> Result<Self> {
        let mut vocab = Self::with_tokens((0..=255u8).map(|b| vec![b]).collect::<Vec<_>>().as_slice())?;
        for (i, &(left, right)) in merges.iter().enumerate() {
            let id = vocab.len() as u32;
            if left >= id || right >= id {
                return Err(Error::invalid(format!(
                    "merge {i} joins ids {left} and {right}, but only {id} exist there"
                )));
            }
            let bytes = [vocab.token(left), vocab.token(right)].concat();
            vocab.push(&bytes)?;
            vocab.set_parts(id, left, right);
        }
        Ok(vocab)
    }

    /// A vocabulary of any tokens, the id of each being its place. All 256 single bytes must be among them.
    ///
    /// Which pairs of ids merge follows from the bytes as in tiktoken (the pair whose bytes have the lowest rank goes
    /// first): merging the bytes of a token alone ends with the one pair that makes this token. No other pair of ids
    /// with the same bytes is ever adjacent in any text: as long as no merge crosses the ends of a stretch of text, the
    /// merges inside it are those of the stretch alone.
    ///
    /// # Errors
    /// An empty or repeated token, a missing byte, more than 4 GiB of tokens.
    pub fn from_tokens(tokens: &[Vec<u8>]) -> Result<Self> {
        let mut vocab = Self::with_tokens(tokens)?;
        // By length: what a token is made of is known when its turn comes.
        let mut order: Vec<u32> = (0..vocab.len() as u32).filter(|&id| tokens[id as usize].len() > 1).collect();
        order.sort_by_key(|&id| tokens[id as usize].len());
        let mut parts = Vec::new();
        for id in order {
            parts.clear();
            merge_piece(&vocab, &tokens[id as usize], &mut parts, &mut || Ok(()))?;
            if let &[left, right] = parts.as_slice() {
                vocab.set_parts(id, left, right);
            }
        }
        Ok(vocab)
    }

    fn with_tokens(tokens: &[Vec<u8>]) -> Result<Self> {
        let mut vocab = Self {
            bytes: Vec::new(),
            starts: vec![0],
            byte_ids: [NO_ID; 256],
            pairs: PairTable::new(),
            parts: Vec::new(),
            monotone: true,
            heads: Vec::new(),
            short: vec![FREE; 1024],
            filter: vec![0; 1024 / 8],
            long: HashTable::new(),
        };
        for token in tokens {
            vocab.push(token)?;
        }
        for byte in 0..=255u8 {
            vocab.byte_ids[byte as usize] = vocab.find(&[byte], 0, 1).ok_or_else(|| {
                Error::invalid(format!("the ranks lack the single byte {byte:#04x}; all 256 are needed"))
            })?;
        }
        Ok(vocab)
    }

    fn push(&mut self, token: &[u8]) -> Result<()> {
        let id = self.len() as u32;
        if token.is_empty() {
            return Err(Error::invalid(format!("the token of rank {id} is empty")));
        }
        if let Some(known) = self.find(token, 0, token.len()) {
            return Err(Error::invalid(format!("ranks {known} and {id} have the same bytes {}", show(token))));
        }
        self.bytes.extend_from_slice(token);
        if self.bytes.len() >= NO_ID as usize {
            return Err(Error::invalid("the tokens take more than 4 GiB"));
        }
        self.starts.push(self.bytes.len() as u32);
        self.parts.push((NO_ID, NO_ID));
        self.heads.push(head_of(token));
        if let Some(key) = Key::of(token, 0, token.len()) {
            self.insert_short(key, id);
        } else {
            let Self { bytes, starts, long, .. } = self;
            let token_hash =
                |&id: &u32| hash_bytes(&bytes[starts[id as usize] as usize..starts[id as usize + 1] as usize]);
            long.insert_unique(hash_bytes(token), id, token_hash);
        }
        Ok(())
    }

    fn set_parts(&mut self, id: u32, left: u32, right: u32) {
        self.pairs.insert(left, right, id);
        if let &[first, second] = self.token(id) {
            self.pairs.insert_bytes(first, second, id);
        }
        self.parts[id as usize] = (left, right);
        self.monotone &= left.max(right) < id;
    }

    /// Half full at most, so that a miss ends soon.
    fn insert_short(&mut self, key: Key, id: u32) {
        if self.len() * 2 > self.short.len() {
            let size = self.short.len() * 2;
            self.filter = vec![0; size / 8];
            let old = std::mem::replace(&mut self.short, vec![FREE; size]);
            old.into_iter().filter(|&slot| slot != FREE).for_each(|slot| self.place_short(slot));
        }
        let key = key.get();
        self.place_short([key as u64, (key >> 64) as u64, u64::from(id)]);
    }

    fn place_short(&mut self, entry: [u64; 3]) {
        let hash = hash(u128::from(entry[1]) << 64 | u128::from(entry[0]));
        let (word, bit) = self.filter_bit(hash);
        self.filter[word] |= bit;
        let mask = self.short.len() - 1;
        let mut slot = hash as usize & mask;
        while self.short[slot] != FREE {
            slot = (slot + 1) & mask;
        }
        self.short[slot] = entry;
    }

    /// Where the filter says whether a key may be there: eight bits a slot, of which 1 in 16 is set at most.
    #[inline]
    fn filter_bit(&self, hash: u64) -> (usize, u64) {
        ((hash >> 38) as usize & (self.filter.len() - 1), 1 << (hash >> 32 & 63))
    }

    /// The id of a string of at most 15 bytes.
    #[inline]
    pub fn find_short(&self, key: Key) -> Option<u32> {
        let key = key.get();
        let hash = hash(key);
        let (word, bit) = self.filter_bit(hash);
        if self.filter[word] & bit == 0 {
            return None;
        }
        let mask = self.short.len() - 1;
        let mut slot = hash as usize & mask;
        loop {
            let [low, high, id] = self.short[slot];
            if [low, high] == [key as u64, (key >> 64) as u64] {
                return Some(id as u32);
            }
            if high == 0 {
                return None;
            }
            slot = (slot + 1) & mask;
        }
    }

    /// The id whose bytes are `text[start..end]`.
    pub fn find(&self, text: &[u8], start: usize, end: usize) -> Option<u32> {
        let wanted = &text[start..end];
        if let Some(key) = Key::of(text, start, end) {
            return self.find_short(key);
        }
        self.long.find(hash_bytes(wanted), |&id| self.token(id) == wanted).copied()
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Never true: 256 bytes are always there.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of `id`.
    #[inline]
    pub fn token(&self, id: u32) -> &[u8] {
        &self.bytes[self.starts[id as usize] as usize..self.starts[id as usize + 1] as usize]
    }

    /// The id of a single byte.
    #[inline]
    pub fn byte_id(&self, byte: u8) -> u32 {
        self.byte_ids[byte as usize]
    }

    /// What `left` and `right` side by side merge into, or [`NO_ID`].
    #[inline]
    pub fn merged(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(left, right)
    }

    /// What two bytes side by side merge into, or [`NO_ID`].
    #[inline]
    pub fn merged_bytes(&self, left: u8, right: u8) -> u32 {
        self.pairs.of_bytes(left, right)
    }

    /// The two ids that merge into `id`; both [`NO_ID`] for a byte and for a token that no merge makes.
    #[inline]
    pub fn parts(&self, id: u32) -> (u32, u32) {
        self.parts[id as usize]
    }

    /// True if every merge makes a larger id than its parts, as in every trained vocabulary.
    pub fn is_monotone(&self) -> bool {
        self.monotone
    }

    /// The bytes of `ids`. O(bytes).
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn decode(&self, ids: impl ExactSizeIterator<Item = u32>) -> Result<Vec<u8>> {
        let mut out = vec![0; ids.len() * 5 + size_of::<Head>()];
        let mut at = 0;
        for id in ids {
            let Some(head) = self.heads.get(id as usize) else {
                return Err(Error::invalid(unknown_id(id, self.len())));
            };
            let len = head[MAX_SHORT];
            if let Some(room) = out.get_mut(at..at + size_of::<Head>()).filter(|_| len != LONG) {
                // Sixteen bytes whatever the length: a copy of fixed size is a register, and the next token writes
                // over what is too much.
                room.copy_from_slice(head);
                at += usize::from(len);
            } else {
                let token = self.token(id);
                out.resize(out.len().max((at + token.len()) * 3 / 2 + size_of::<Head>()), 0);
                out[at..at + token.len()].copy_from_slice(token);
                at += token.len();
            }
        }
        out.truncate(at);
        Ok(out)
    }
}

/// What is said of an id that is not in the vocabulary.
pub fn unknown_id(id: impl std::fmt::Display, vocab_size: usize) -> String {
    format!("unknown token id {id}: the vocabulary has the ids 0 to {}", vocab_size - 1)
}

/// Bytes as Python would print them.
pub fn show(bytes: &[u8]) -> String {
    format!("b\"{}\"", bytes.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte_tokens() -> Vec<Vec<u8>> {
        (0..=255u8).map(|b| vec![b]).collect()
    }

    #[test]
    fn merges_and_tokens_give_the_same_pairs() {
        let merges = [(97, 98), (256, 99), (97, 97), (258, 258), (257, 257), (32, 260)];
        let by_merges = Vocab::from_merges(&merges).unwrap();
        let tokens: Vec<_> = (0..by_merges.len() as u32).map(|id| by_merges.token(id).to_vec()).collect();
        let by_tokens = Vocab::from_tokens(&tokens).unwrap();
        assert_eq!(by_merges.parts, by_tokens.parts);
        for (&(left, right), id) in by_tokens.parts[256..].iter().zip(256..) {
            assert_eq!(by_tokens.merged(left, right), id);
        }
        assert!(by_tokens.is_monotone());
    }

    #[test]
    fn bad_vocabularies_are_refused() {
        let message = |tokens: Vec<Vec<u8>>| Vocab::from_tokens(&tokens).err().map(|e| e.to_string()).unwrap();
        assert!(message(byte_tokens()[1..].to_vec()).contains("lack the single byte 0x00"));
        assert!(
            message([byte_tokens(), vec![b"a".to_vec()]].concat()).contains("ranks 97 and 256 have the same bytes")
        );
        assert!(message([byte_tokens(), vec![vec![]]].concat()).contains("empty"));
        assert!(Vocab::from_merges(&[(256, 1)]).is_err());
    }

    #[test]
    fn decoding_checks_every_id() {
        let vocab = Vocab::from_merges(&[(97, 98)]).unwrap();
        assert_eq!(vocab.decode([256, 99].into_iter()).unwrap(), b"abc");
        assert!(vocab.decode([257].into_iter()).unwrap_err().to_string().contains("unknown token id 257"));
        assert_eq!(vocab.decode([].into_iter()).unwrap(), b"");
    }

    #[test]
    fn decoding_joins_tokens_of_any_length() {
        let long: Vec<Vec<u8>> = (14..40).map(|n| vec![b'x'; n]).chain([vec![b'y'; 5000]]).collect();
        let vocab = Vocab::from_tokens(&[byte_tokens(), long].concat()).unwrap();
        let ids: Vec<u32> = (0..20_000u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab.len() as u32).collect();
        let expected: Vec<u8> = ids.iter().flat_map(|&id| vocab.token(id)).copied().collect();
        assert_eq!(vocab.decode(ids.into_iter()).unwrap(), expected);
    }
}
