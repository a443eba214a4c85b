//! Tensor maps: what `cuTensorMapEncodeTiled` makes and `cp.async.bulk.tensor` reads.
//!
//! The 128 bytes are opaque on a GPU, so the layout here is our own; `tensormap.replace` writes the same fields.

/// Bytes of a tensor map.
pub const BYTES: usize = 128;

/// Why a tensor map cannot be made: CUDA error 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tensor map: {0}")]
pub struct TensorMapError(String);

/// A decoded tensor map. Dimension 0 is the innermost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TensorMap {
    /// Global address, a multiple of 16.
    pub address: u64,
    /// Number of dimensions, 1..=5.
    pub rank: u32,
    /// `CUtensorMapDataType`: 0 u8, 1 u16, 2 u32, 3 i32, 4 u64, 5 i64, 6 f16, 7 f32, 8 f64, 9 bf16, 10 f32 ftz, 11 tf32, 12 tf32 ftz.
    pub data_type: u32,
    /// `CUtensorMapInterleave`: 0 none; others are not simulated.
    pub interleave: u32,
    /// `CUtensorMapSwizzle`: 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes.
    pub swizzle: u32,
    /// `CUtensorMapFloatOOBfill`: 0 zeros, 1 NaN.
    pub fill: u32,
    /// Elements in each dimension.
    pub dims: [u32; 5],
    /// Bytes from one index to the next in dimensions 1.. (`strides[0]` belongs to dimension 1).
    pub strides: [u64; 4],
    /// Elements of the box in each dimension.
    pub boxes: [u32; 5],
    /// Step between elements in each dimension.
    pub steps: [u32; 5],
}

// Byte offsets of the fields.
pub(crate) const ADDRESS: usize = 0;
pub(crate) const RANK: usize = 8;
pub(crate) const TYPE: usize = 9;
pub(crate) const INTERLEAVE: usize = 10;
pub(crate) const SWIZZLE: usize = 11;
pub(crate) const FILL: usize = 12;
pub(crate) const DIMS: usize = 16;
pub(crate) const STRIDES: usize = 40;
pub(crate) const BOXES: usize = 72;
pub(crate) const STEPS: usize = 96;

impl TensorMap {
    /// Bytes of one element.
    pub fn element_bytes(&self) -> u32 {
        [1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4].get(self.data_type as usize).copied().unwrap_or(0)
    }

    /// The map as bytes. Steps of 0 count as 1.
    pub fn encode(&self) -> Result<[u8; BYTES], TensorMapError> {
        self.check()?;
        let mut b = [0u8; BYTES];
        b[ADDRESS..ADDRESS + 8].copy_from_slice(&self.address.to_le_bytes());
        b[RANK] = self.rank as u8 - 1;
        b[TYPE] = self.data_type as u8;
        b[INTERLEAVE] = self.interleave as u8;
        b[SWIZZLE] = self.swizzle as u8;
        b[FILL] = self.fill as u8;
        for i in 0..5 {
            b[DIMS + 4 * i..DIMS + 4 * i + 4].copy_from_slice(&self.dims[i].to_le_bytes());
            b[BOXES + 4 * i..BOXES + 4 * i + 4].copy_from_slice(&self.boxes[i].to_le_bytes());
            b[STEPS + 4 * i..STEPS + 4 * i + 4].copy_from_slice(&self.steps[i].to_le_bytes());
        }
        for i in 0..4 {
            b[STRIDES + 8 * i..STRIDES + 8 * i + 8].copy_from_slice(&self.strides[i].to_le_bytes());
        }
        Ok(b)
    }

    /// Reads what [`TensorMap::encode`] or `tensormap.replace` wrote, and checks it.
    pub fn decode(b: &[u8; BYTES]) -> Result<TensorMap, TensorMapError> {
        let u32_at = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) | u64::from(u32_at(i + 4)) << 32;
        let mut map = TensorMap {
            address: u64_at(ADDRESS),
            rank: u32::from(b[RANK]) + 1,
            data_type: b[TYPE].into(),
            interleave: b[INTERLEAVE].into(),
            swizzle: b[SWIZZLE].into(),
            fill: b[FILL].into(),
            ..TensorMap::default()
        };
        for i in 0..5 {
            map.dims[i] = u32_at(DIMS + 4 * i);
            map.boxes[i] = u32_at(BOXES + 4 * i);
            map.steps[i] = u32_at(STEPS + 4 * i);
        }
        for i in 0..4 {
            map.strides[i] = u64_at(STRIDES + 8 * i);
        }
        map.check()?;
        Ok(map)
    }

    /// The conditions of the CUDA driver's documentation.
    fn check(&self) -> Result<(), TensorMapError> {
        let fail = |text: String| Err(TensorMapError(text));
        if !(1..=5).contains(&self.rank) {
            return fail(format!("rank {} is not in 1..=5", self.rank));
        }
        let size = u64::from(self.element_bytes());
        if size == 0 {
            return fail(format!("data type {} is unknown", self.data_type));
        }
        if self.interleave != 0 {
            return fail(format!("interleave mode {} is not simulated", self.interleave));
        }
        if self.swizzle > 3 {
            return fail(format!("swizzle mode {} is not simulated", self.swizzle));
        }
        if self.fill > 1 {
            return fail(format!("fill mode {} is unknown", self.fill));
        }
        if !self.address.is_multiple_of(16) {
            return fail(format!("global address {:#x} is not a multiple of 16", self.address));
        }
        for i in 0..self.rank as usize {
            if self.dims[i] == 0 {
                return fail(format!("dimension {i} has no elements"));
            }
            if self.boxes[i] == 0 || self.boxes[i] > 256 {
                return fail(format!("the box has {} elements in dimension {i}, must be in 1..=256", self.boxes[i]));
            }
            if self.steps[i] > 8 {
                return fail(format!("element stride {} in dimension {i} is larger than 8", self.steps[i]));
            }
            if i > 0 && (!self.strides[i - 1].is_multiple_of(16) || self.strides[i - 1] >= 1 << 40) {
                return fail(format!(
                    "stride {} of dimension {i} is not a multiple of 16 below 2^40",
                    self.strides[i - 1]
                ));
            }
        }
        let inner = u64::from(self.boxes[0]) * size;
        if !inner.is_multiple_of(16) {
            return fail(format!("the box is {inner} bytes wide, must be a multiple of 16"));
        }
        let widest = [u64::MAX, 32, 64, 128][self.swizzle as usize];
        if inner > widest {
            return fail(format!("the box is {inner} bytes wide, its swizzle mode allows {widest}"));
        }
        Ok(())
    }
}
