//! Accesses of all lanes side by side go a way of their own: it must do what the way of single lanes does.

mod common;
use common::{PROLOGUE, Random, transform};
use cuda_sim::{Arch, Device, FaultClass, LaunchConfig, Options};

/// Copies an element a thread, widened to `to`; lanes for which `%p0` is false are left out.
fn copy(guard: &str, from: &str, to: &str, bytes: u32, to_bytes: u32, registers: &str) -> String {
    format!(
        "{PROLOGUE}setp.ne.u32 %p0, %r0, 31; mad.wide.u32 %rd2, %r0, {bytes}, %rd0; mad.wide.u32 %rd3, %r0, {to_bytes}, %rd1;\n\
         {guard} ld.global.{from} {registers}, [%rd2];\n{guard} st.global.{to} [%rd3], {registers};\nret; }}"
    )
}

#[test]
fn all_widths() {
    let mut random = Random(5);
    let input: Vec<u32> = (0..512).map(|_| random.next() << 1 ^ random.next()).collect();
    for (from, to, bytes, to_bytes, registers) in [
        ("u8", "u8", 1, 1, "%h0"),
        ("s8", "b32", 1, 4, "%r1"),
        ("u8", "b64", 1, 8, "%rd4"),
        ("u16", "u16", 2, 2, "%h0"),
        ("s16", "b32", 2, 4, "%r1"),
        ("b32", "b32", 4, 4, "%r1"),
        ("s32", "b64", 4, 8, "%rd4"),
        ("f32", "f32", 4, 4, "%f1"),
        ("b64", "b64", 8, 8, "%rd4"),
        ("f64", "f64", 8, 8, "%fd1"),
        ("v2.u8", "v2.u8", 2, 2, "{%h0, %h1}"),
        ("v4.u16", "v4.u16", 8, 8, "{%h0, %h1, %h2, %h3}"),
        ("v2.b32", "v2.b32", 8, 8, "{%r1, %r2}"),
        ("v4.b32", "v4.b32", 16, 16, "{%r1, %r2, %r3, %r4}"),
        ("v2.b64", "v2.b64", 16, 16, "{%rd4, %rd5}"),
    ] {
        let words = 32 * to_bytes as usize / 4;
        let all = transform(&copy("", from, to, bytes, to_bytes, registers), 32, 0, &input, words);
        let most = transform(&copy("@%p0", from, to, bytes, to_bytes, registers), 32, 0, &input, words);
        let bytes_of = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let (all, most) = (bytes_of(&all), bytes_of(&most));
        let n = 31 * to_bytes as usize;
        assert_eq!(all[..n], most[..n], "{from} to {to}");
        assert!(all[n..].iter().any(|b| *b != 0) && most[n..].iter().all(|b| *b == 0), "{from} to {to}");
    }
}

/// The last lane is beyond the end, or reads what nobody wrote, or a constant is written: found as ever.
#[test]
fn faults_of_one_lane() {
    let load = "ld.global.f32 %f1, [%rd2];";
    let store = "st.global.f32 [%rd2], 0f00000000;";
    for (access, floats, written, class) in [
        (load, 31, 31, Some(FaultClass::OobGlobal)),
        (store, 31, 31, Some(FaultClass::OobGlobal)),
        (load, 32, 31, Some(FaultClass::UninitialisedGlobal)),
        (load, 32, 32, None),
        (store, 32, 0, None),
    ] {
        let text = format!(
            ".version 8.5\n.target sm_90a\n.address_size 64\n{PROLOGUE}mad.wide.u32 %rd2, %r0, 4, %rd0; {access}\nret; }}"
        );
        let device = Device::new(Arch::SM_90, Options::default());
        let module = device.load_module(&text).unwrap();
        let x = device.alloc(4 * floats).unwrap();
        device.write(x, &vec![1; 4 * written]).unwrap();
        let f = module.function("k").unwrap();
        let params = [x.to_le_bytes(), x.to_le_bytes()].concat();
        let result = device.launch(&f, &LaunchConfig::new([1; 3], [32, 1, 1]), &params);
        assert_eq!(result.err().map(|e| e.class), class, "{access} of {floats} floats, {written} written");
    }
}

/// Two blocks that touch the same row, one of them with writes: a race, whichever way it is found.
#[test]
fn races_between_blocks() {
    let kernel = |value: &str| {
        format!(
            ".visible .entry k(.param .u64 out) {{ .reg .b32 %r<8>; .reg .b64 %rd<4>; .reg .pred %p<2>; ld.param.u64 %rd0, [out]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; add.u32 %r3, %r2, 1; setp.eq.u32 %p0, %r2, 0;\n\
             mad.wide.u32 %rd1, %r1, 4, %rd0; {value} ret; }}"
        )
    };
    let run = |value: &str| common::kernel(&kernel(value), Arch::SM_90, 2, 32, 0, 32).1.err().map(|e| e.class);
    assert_eq!(run("st.global.u32 [%rd1], %r3;"), Some(FaultClass::DataRaceGlobal));
    assert_eq!(run("st.global.u32 [%rd1], %r1;"), None);
    assert_eq!(run("ld.global.u32 %r4, [%rd1];"), None);
    assert_eq!(
        run("@%p0 bra A; ld.global.u32 %r4, [%rd1]; bra B; A: st.global.u32 [%rd1], %r3; B:"),
        Some(FaultClass::DataRaceGlobal)
    );
}

/// Block 0 writes parts of what all lanes of block 1 write side by side: bytes that stay as they are make no race, a lane
/// that changes any of its bytes writes all of them. With and without the last lane, which takes the access to the way of
/// single lanes, the answer is the same.
#[test]
fn races_of_parts_of_words() {
    let run = |first: &str, second: &str, guard: &str| {
        let text = format!(
            ".visible .entry k(.param .u64 out) {{ .reg .b32 %r<8>; .reg .b16 %h<4>; .reg .b64 %rd<4>; .reg .pred %p<2>; ld.param.u64 %rd0, [out]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; setp.eq.u32 %p0, %r2, 0; setp.ne.u32 %p1, %r1, 31;\n\
             and.b32 %r3, %r1, 1; mad.lo.u32 %r3, %r3, 2, 7; cvt.u16.u32 %h1, %r3; mov.u16 %h0, 7; mov.u32 %r4, 7; mov.u32 %r5, 9;\n\
             @%p0 bra A; {second} ret; A: {first} ret; }}",
            second = second.replace("st.", &format!("{guard} st."))
        );
        let options = Options { threads: 1, ..Options::default() };
        common::kernel_with(&text, Arch::SM_90, 2, 32, 0, 128, options).1.err().map(|e| e.class)
    };
    // The even halves, then 7 and 9 in turns: only odd halves change. Then 9 in turns with 9, over the sevens.
    let evens = "mad.wide.u32 %rd1, %r1, 4, %rd0; st.global.u16 [%rd1], %h0;";
    let same = "mad.wide.u32 %rd1, %r1, 2, %rd0; st.global.u16 [%rd1], %h1;";
    let other = "mad.wide.u32 %rd1, %r1, 2, %rd0; cvt.u16.u32 %h2, %r5; st.global.u16 [%rd1], %h2;";
    // The first word of every four, then all four.
    let firsts = "mad.wide.u32 %rd1, %r1, 16, %rd0; st.global.u32 [%rd1], %r4;";
    let fours = "mad.wide.u32 %rd1, %r1, 16, %rd0; st.global.v4.u32 [%rd1], {%r4, %r5, %r5, %r5};";
    for guard in ["", "@%p1"] {
        assert_eq!(run(evens, same, guard), None, "{guard}");
        assert_eq!(run(evens, other, guard), Some(FaultClass::DataRaceGlobal), "{guard}");
        assert_eq!(run(firsts, fours, guard), Some(FaultClass::DataRaceGlobal), "{guard}");
    }
}
