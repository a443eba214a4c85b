//! Tensor maps.

use crate::abi::*;
use cuda_sim::tensor_map::{BYTES, TensorMap};
use std::ffi::c_uint;

fn narrow<T: Into<u64> + Copy>(what: &str, values: Vec<T>) -> Outcome<Vec<u32>> {
    let one =
        |v: T| u32::try_from(v.into()).map_err(|_| failure(INVALID_VALUE, format!("{what} {} is too large", v.into())));
    values.into_iter().map(one).collect()
}

driver_calls! {
    fn cuTensorMapEncodeTiled(
        out: Out<[u8; BYTES]>, data_type: c_uint, rank: c_uint, address: u64, dims: In<u64>, strides: In<u64>,
        boxes: In<u32>, steps: In<u32>, interleave: c_uint, swizzle: c_uint, _l2: c_uint, fill: c_uint,
    ) {
        if !out.address().is_multiple_of(64) {
            return Err(failure(INVALID_VALUE, "a tensor map must lie at a multiple of 64 bytes"));
        }
        if !(1..=5).contains(&rank) {
            return Err(failure(INVALID_VALUE, format!("a tensor of {rank} dimensions is not in 1..=5")));
        }
        let n = rank as usize;
        let mut map = TensorMap { address, rank, data_type, interleave, swizzle, fill, ..TensorMap::default() };
        map.dims[..n].copy_from_slice(&narrow("dimension", dims.take(n)?)?);
        map.boxes[..n].copy_from_slice(&narrow("box", boxes.take(n)?)?);
        map.steps[..n].copy_from_slice(&narrow("element stride", steps.take(n)?)?);
        if n > 1 {
            map.strides[..n - 1].copy_from_slice(&strides.take(n - 1)?);
        }
        out.set(map.encode().map_err(|e| failure(INVALID_VALUE, e.to_string()))?)
    }
}
