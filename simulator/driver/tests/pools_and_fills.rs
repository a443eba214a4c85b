//! Memory pools and fills, through cudarc's `sys`.

mod common;

use common::own_process;
use common::raw::{Buffer, INVALID_HANDLE, INVALID_VALUE, OK, read, setup};
use cudarc::driver::sys::{self, CUmemPool_attribute as PoolAttribute, CUresult};

fn pool_attribute(pool: sys::CUmemoryPool, id: PoolAttribute) -> u64 {
    let mut value = 0u64;
    // SAFETY: eight bytes are room for every attribute.
    assert_eq!(unsafe { sys::cuMemPoolGetAttribute(pool, id, (&raw mut value).cast()) }, OK);
    value
}

fn set_pool(pool: sys::CUmemoryPool, id: PoolAttribute, mut value: u64) -> CUresult {
    // SAFETY: as above.
    unsafe { sys::cuMemPoolSetAttribute(pool, id, (&raw mut value).cast()) }
}

#[test]
fn memory_pools_count_what_they_give_out() {
    own_process("memory_pools_count_what_they_give_out", &[], || {
        use PoolAttribute::*;
        let (context, stream) = setup();
        let free_at_first = context.mem_get_info().unwrap().0;
        let mut pool = std::ptr::null_mut();
        let mut usual = std::ptr::null_mut();
        let mut now = std::ptr::null_mut();
        // SAFETY: all results outlive the calls; zeroed properties are valid; addresses are those given out.
        unsafe {
            let properties: sys::CUmemPoolProps = std::mem::zeroed();
            assert_eq!(sys::cuMemPoolCreate(&mut pool, &properties), OK);
            assert_eq!(sys::cuMemPoolCreate(&mut pool, std::ptr::null()), INVALID_VALUE);
            assert_eq!(sys::cuDeviceGetDefaultMemPool(&mut usual, 0), OK);
            assert_eq!(sys::cuDeviceGetMemPool(&mut now, 0), OK);
            assert!(now == usual && pool != usual && !pool.is_null());

            let (mut a, mut unused) = ([0; 3], 0);
            assert_eq!(sys::cuMemAllocFromPoolAsync(&mut a[0], 5000, pool, stream.cu_stream()), OK);
            assert_eq!(sys::cuMemAllocFromPoolAsync(&mut a[1], 3000, pool, stream.cu_stream()), OK);
            // The pool is the current one only once it is made so.
            assert_eq!(sys::cuMemAllocAsync(&mut a[2], 700, stream.cu_stream()), OK);
            let usage = |pool| {
                [CU_MEMPOOL_ATTR_USED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_HIGH].map(|id| pool_attribute(pool, id))
            };
            assert_eq!(usage(pool), [8000, 8000]);
            assert_eq!(usage(usual), [700, 700]);
            assert!(pool_attribute(pool, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT) >= 8000);
            // The memory is real: three buffers that do not overlap.
            for (i, (at, n)) in a.into_iter().zip([5000, 3000, 700]).enumerate() {
                assert_eq!(sys::cuMemsetD8Async(at, i as u8 + 1, n, stream.cu_stream()), OK);
            }
            for (i, (at, n)) in a.into_iter().zip([5000, 3000, 700]).enumerate() {
                assert_eq!(read(at, n), vec![i as u8 + 1; n]);
            }
            assert_eq!(sys::cuMemFreeAsync(a[0], stream.cu_stream()), OK);
            assert_eq!(usage(pool), [3000, 8000]);
            assert_eq!(sys::cuMemFreeAsync(a[0], stream.cu_stream()), INVALID_VALUE);
            // High marks can only be reset to zero, and start again from what is in use.
            assert_eq!(set_pool(pool, CU_MEMPOOL_ATTR_USED_MEM_HIGH, 5), INVALID_VALUE);
            assert_eq!(set_pool(pool, CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0), OK);
            assert_eq!(usage(pool), [3000, 3000]);
            assert!(pool_attribute(pool, CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH) >= 8000);
            assert_eq!(set_pool(pool, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, 0), INVALID_VALUE);
            // Settings keep their values; the release threshold has 64 bits.
            assert_eq!(pool_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD), 0);
            assert_eq!(set_pool(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX - 1), OK);
            assert_eq!(pool_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD), u64::MAX - 1);
            assert_eq!(pool_attribute(pool, CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC), 1);
            assert_eq!(set_pool(pool, CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC, 0), OK);
            assert_eq!(pool_attribute(pool, CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC), 0);
            assert_eq!(pool_attribute(usual, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD), 0);
            assert_eq!(sys::cuMemPoolTrimTo(pool, 0), OK);
            assert_eq!(read(a[1], 3000), vec![2; 3000]);

            // As the device's current pool it serves cuMemAllocAsync; destroyed, the default pool is current again,
            // and what it gave out lives on.
            assert_eq!(sys::cuDeviceSetMemPool(0, pool), OK);
            assert_eq!(sys::cuDeviceGetMemPool(&mut now, 0), OK);
            assert_eq!(now, pool);
            assert_eq!(sys::cuMemAllocAsync(&mut a[0], 100, stream.cu_stream()), OK);
            assert_eq!(usage(pool), [3100, 3100]);
            assert_eq!(sys::cuMemPoolDestroy(pool), OK);
            assert_eq!(sys::cuDeviceGetMemPool(&mut now, 0), OK);
            assert_eq!(now, usual);
            assert_eq!(read(a[1], 3000), vec![2; 3000]);
            assert_eq!(sys::cuMemPoolDestroy(pool), INVALID_HANDLE);
            assert_eq!(sys::cuMemPoolTrimTo(pool, 0), INVALID_HANDLE);
            assert_eq!(sys::cuMemAllocFromPoolAsync(&mut unused, 1, pool, stream.cu_stream()), INVALID_HANDLE);
            assert_eq!(sys::cuMemPoolDestroy(usual), INVALID_VALUE);
            for address in a {
                assert_eq!(sys::cuMemFreeAsync(address, stream.cu_stream()), OK);
            }
            assert_eq!(usage(usual), [0, 700]);
        }
        assert_eq!(context.mem_get_info().unwrap().0, free_at_first);
    });
}

#[test]
fn fills_write_their_pattern_and_nothing_else() {
    type Call<'a> = &'a dyn Fn() -> CUresult;
    own_process("fills_write_their_pattern_and_nothing_else", &[], || {
        let (context, _stream) = setup();
        let stream = context.new_stream().unwrap();
        let s = stream.cu_stream();
        let buffer = Buffer::new(256);
        let (to, canary) = (buffer.0 + 8, 0xee);
        // Bytes of a fill of `rows` times `count` patterns, `pitch` apart, 8 bytes into the canaries.
        let expected = |pattern: &[u8], count: usize, rows: usize, pitch: usize| {
            let mut all = vec![canary; 256];
            for row in 0..rows {
                for i in 0..count * pattern.len() {
                    all[8 + row * pitch + i] = pattern[i % pattern.len()];
                }
            }
            all
        };
        let (p8, p16, p32) = (0xa1u8, 0xb2c3u16, 0xd4e5_f607u32);
        // SAFETY: addresses and sizes lie in the buffer, or the call is refused.
        unsafe {
            let cases: [(&str, Call, Vec<u8>); 13] = [
                ("D8", &|| sys::cuMemsetD8_v2(to, p8, 13), expected(&[p8], 13, 1, 0)),
                ("D16", &|| sys::cuMemsetD16_v2(to, p16, 13), expected(&p16.to_le_bytes(), 13, 1, 0)),
                ("D32", &|| sys::cuMemsetD32_v2(to, p32, 13), expected(&p32.to_le_bytes(), 13, 1, 0)),
                ("D8Async", &|| sys::cuMemsetD8Async(to, p8, 9, s), expected(&[p8], 9, 1, 0)),
                ("D16Async", &|| sys::cuMemsetD16Async(to, p16, 9, s), expected(&p16.to_le_bytes(), 9, 1, 0)),
                ("D32Async", &|| sys::cuMemsetD32Async(to, p32, 9, s), expected(&p32.to_le_bytes(), 9, 1, 0)),
                ("D2D8", &|| sys::cuMemsetD2D8_v2(to, 33, p8, 7, 5), expected(&[p8], 7, 5, 33)),
                ("D2D16", &|| sys::cuMemsetD2D16_v2(to, 34, p16, 7, 5), expected(&p16.to_le_bytes(), 7, 5, 34)),
                ("D2D32", &|| sys::cuMemsetD2D32_v2(to, 36, p32, 7, 5), expected(&p32.to_le_bytes(), 7, 5, 36)),
                ("D2D8Async", &|| sys::cuMemsetD2D8Async(to, 7, p8, 7, 5, s), expected(&[p8], 7, 5, 7)),
                (
                    "D2D16Async",
                    &|| sys::cuMemsetD2D16Async(to, 40, p16, 3, 4, s),
                    expected(&p16.to_le_bytes(), 3, 4, 40),
                ),
                // The pitch of a single row is not used.
                ("D2D32Async", &|| sys::cuMemsetD2D32Async(to, 3, p32, 3, 1, s), expected(&p32.to_le_bytes(), 3, 1, 0)),
                ("nothing", &|| sys::cuMemsetD32_v2(to, p32, 0), expected(&[], 0, 0, 0)),
            ];
            for (name, fill, want) in cases {
                buffer.write(&[canary; 256]);
                assert_eq!(fill(), OK, "{name}");
                stream.synchronize().unwrap();
                assert_eq!(buffer.read(), want, "{name}");
            }
            buffer.write(&[canary; 256]);
            let refused: [(&str, Call); 9] = [
                ("past the end", &|| sys::cuMemsetD8_v2(to, p8, 249)),
                ("past the end, 16", &|| sys::cuMemsetD16Async(to, p16, 125, s)),
                ("past the end, rows", &|| sys::cuMemsetD2D8_v2(to, 64, p8, 57, 4)),
                ("count overflows", &|| sys::cuMemsetD32_v2(to, p32, usize::MAX / 2)),
                ("address of 16", &|| sys::cuMemsetD16_v2(to + 1, p16, 1)),
                ("address of 32", &|| sys::cuMemsetD32Async(to + 2, p32, 1, s)),
                ("pitch of 16", &|| sys::cuMemsetD2D16_v2(to, 33, p16, 2, 2)),
                ("overlapping rows", &|| sys::cuMemsetD2D32_v2(to, 8, p32, 3, 2)),
                ("null", &|| sys::cuMemsetD8_v2(0, p8, 1)),
            ];
            for (name, fill) in refused {
                assert_eq!(fill(), INVALID_VALUE, "{name}");
            }
            assert_eq!(buffer.read()[..72], [canary; 72], "a refused fill wrote");
            assert_eq!(sys::cuMemsetD8Async(to, p8, 1, 0x123 as sys::CUstream), INVALID_HANDLE);
        }
    });
}
