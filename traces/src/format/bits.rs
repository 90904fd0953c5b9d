//! Numbers of a few bits, and of as many bytes as they need.

/// Bits that tell `count` values apart: 5 for 32, 6 for 33, 0 for 1.
pub fn width(count: usize) -> u32 {
    usize::BITS - count.saturating_sub(1).leading_zeros()
}

/// Seven bits a byte, lowest first; the high bit says that more follow.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Packs numbers, lowest bit first.
pub struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    held: u64,
    count: u32,
}

impl<'a> BitWriter<'a> {
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out, held: 0, count: 0 }
    }

    /// `value` has at most `bits` bits, at most 32.
    pub fn put(&mut self, value: u32, bits: u32) {
        self.held |= u64::from(value) << self.count;
        self.count += bits;
        while self.count >= 8 {
            self.out.push(self.held as u8);
            self.held >>= 8;
            self.count -= 8;
        }
    }

    /// Fills the last byte with zeros.
    pub fn finish(self) {
        if self.count > 0 {
            self.out.push(self.held as u8);
        }
    }
}

/// Takes bytes from the front; every answer is `None` where too few are left.
#[derive(Clone, Copy)]
pub struct Bytes<'a> {
    pub left: &'a [u8],
}

impl<'a> Bytes<'a> {
    pub fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, left) = self.left.split_at_checked(count)?;
        self.left = left;
        Some(taken)
    }

    pub fn byte(&mut self) -> Option<u8> {
        let (&byte, left) = self.left.split_first()?;
        self.left = left;
        Some(byte)
    }

    pub fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let part = u64::from(byte & 0x7f);
            // The tenth byte has one bit to give.
            if shift == 63 && part > 1 {
                return None;
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    pub fn small(&mut self) -> Option<u32> {
        u32::try_from(self.varint()?).ok()
    }
}

/// Takes numbers of a few bits; what is left of its last byte is skipped.
pub struct BitReader<'a, 'b> {
    bytes: &'a mut Bytes<'b>,
    held: u64,
    count: u32,
}

impl<'a, 'b> BitReader<'a, 'b> {
    pub fn new(bytes: &'a mut Bytes<'b>) -> Self {
        Self { bytes, held: 0, count: 0 }
    }

    /// At most 32 bits.
    pub fn take(&mut self, bits: u32) -> Option<u32> {
        while self.count < bits {
            self.held |= u64::from(self.bytes.byte()?) << self.count;
            self.count += 8;
        }
        let value = self.held & ((1u64 << bits) - 1);
        self.held >>= bits;
        self.count -= bits;
        Some(value as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_the_least_that_do() {
        let pairs = [(1, 0), (2, 1), (3, 2), (32, 5), (33, 6), (256, 8), (1 << 16, 16)];
        pairs.iter().for_each(|&(count, bits)| assert_eq!(width(count), bits, "{count}"));
    }

    #[test]
    fn varints_come_back_and_overlong_ones_do_not() {
        for value in [0, 1, 127, 128, 1 << 32, u64::MAX >> 1, u64::MAX] {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            let mut bytes = Bytes { left: &out };
            assert_eq!((bytes.varint(), bytes.left.len()), (Some(value), 0));
            bytes = Bytes { left: &out[..out.len() - 1] };
            assert_eq!(bytes.varint(), None);
        }
        let ten = [&[0x80u8; 9][..], &[2]].concat();
        assert_eq!(Bytes { left: &ten }.varint(), None);
        assert_eq!(Bytes { left: &[0x80; 20] }.varint(), None);
    }

    #[test]
    fn packed_numbers_come_back() {
        let numbers = [(5, 3), (0, 0), (1023, 10), (u32::MAX, 32), (1, 1), (77, 7)];
        let mut out = Vec::new();
        let mut bits = BitWriter::new(&mut out);
        numbers.iter().for_each(|&(value, width)| bits.put(value, width));
        bits.finish();
        assert_eq!(out.len(), 53usize.div_ceil(8));
        let mut bytes = Bytes { left: &out };
        let mut bits = BitReader::new(&mut bytes);
        for (value, width) in numbers {
            assert_eq!(bits.take(width), Some(value));
        }
        assert_eq!(bits.take(4), None);
    }
}
