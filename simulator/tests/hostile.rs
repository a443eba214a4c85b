//! Text that nobody should write: an error, never a crash, never unbounded memory.

use cuda_sim::{Arch, Device, LoadError, Options};
use proptest::prelude::*;
use std::path::Path;

fn load(text: &str) -> Result<(), LoadError> {
    Device::new(Arch::SM_90, Options::default()).load_module(text).map(|_| ())
}

fn body(text: &str) -> String {
    format!(".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() {{\n{text}\n}}\n")
}

#[test]
fn refused_with_text_and_line() {
    let e = load(&body(".reg .b32 %r<4>;\nfrobnicate.u32 %r1, %r2;\nret;")).unwrap_err();
    assert_eq!((e.line, e.text.as_str()), (6, "frobnicate.u32 %r1, %r2"));
    for (text, part) in [
        ("add.u32 %r1, %r2, %r3;", "not"),
        (".reg .b32 %r<4>; add.u32 %r1, %r2;", "operands"),
        (".reg .b32 %r<4>; add.strange.u32 %r1, %r2, %r3;", "strange"),
        (".reg .b64 %rd<4>; .reg .b32 %r<4>; add.u32 %r1, %rd2, %r3;", "fit"),
        ("bra NOWHERE;", "NOWHERE"),
        ("L: L: ret;", "twice"),
        (".shared .b8 s[99999999]; ret;", "shared"),
        (".local .b8 s[99999999]; ret;", "local"),
        (".reg .b32 %r<4>; call (%r1), missing, (%r2);", "missing"),
        (
            ".reg .b32 %r<9>; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r1}, {%r1}, {%r1};",
            "registers",
        ),
    ] {
        let e = load(&body(text)).unwrap_err().to_string();
        assert!(e.contains(part), "{text}: {e}");
    }
}

#[test]
fn hostile_texts() {
    let deep = |open: &str, close: &str, n: usize| body(&format!("{}{}", open.repeat(n), close.repeat(n)));
    let many = (0..20_000).map(|i| format!("add.u32 %r{i}, %r{}, 1;\n", i + 1)).collect::<String>();
    let chain: String = (0..5_000).map(|i| format!(".func f{i}() {{ call f{}, (); ret; }}\n", i + 1)).collect();
    for text in [
        String::new(),
        "\0".repeat(1000),
        body(".reg .b32 %r<99999999999999999999999>; ret;"),
        ".version 8.0\n.target sm_80\n.global .b8 x[18446744073709551615];".into(),
        ".version 8.0\n.target sm_80\n.global .b8 x[99999999999];".into(),
        ".version 8.0\n.target sm_80\n.global .b8 x[4294967296][4294967296][4294967296];".into(),
        deep("{", "}", 100_000),
        body(&format!(".reg .b32 %r<4>; mov.b32 %r1, {}", "{".repeat(100_000))),
        body(&format!("ld.global.u32 %r1, {}", "[".repeat(100_000))),
        body(&format!(".reg .b32 %r<30000>; {}", many)) + "garbage",
        format!(".version 8.0\n.target sm_80\n{chain}.visible .entry k() {{ call f0, (); ret; }}"),
        body("mov.u32"),
        body("@"),
        "/* no end".into(),
        ".version 8.0\n.target sm_80\n.section .debug {".into(),
    ] {
        assert!(load(&text).is_err(), "{}", &text[..text.len().min(80)]);
    }
}

#[test]
fn declared_registers_cost_nothing() {
    load(&body(".reg .b32 %r<18446744073709551615>; mov.u32 %r99999999999, 1; ret;")).unwrap();
}

#[test]
fn endless_recursion_is_a_stack_overflow() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.func f() { .local .b8 l[64]; call f, (); ret; }\n.visible .entry k() { call f, (); ret; }";
    let device = Device::new(Arch::SM_80, Options::default());
    let module = device.load_module(text).unwrap();
    let f = module.function("k").unwrap();
    let fault = device.launch(&f, &cuda_sim::LaunchConfig::new([1; 3], [32, 1, 1]), &[]).unwrap_err();
    assert!(fault.text.contains("stack overflow"), "{}", fault.text);
}

fn samples() -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path().join("kernel.ptx"));
    files.map(|f| std::fs::read_to_string(f).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_text(text in "\\PC{0,200}") {
        let _ = load(&text);
        let _ = load(&body(&text));
    }

    #[test]
    fn any_tokens(words in prop::collection::vec(prop::sample::select(vec![
        "{", "}", "[", "]", "(", ")", ",", ";", ":", "@", "!", "%r1", "%p1", ".reg", ".b32", ".pred", "add", ".u32", "ld", ".global", "<", ">", "5", "-", "+",
        "0x", "0f3F800000", "L", "bra", ".shared", ".align", "=", "|", "_", "call", ".param", "mov", "\"", "/*", "//", ".v4", "%tid.x",
    ]), 0..60)) {
        let _ = load(&body(&words.join(" ")));
    }

    /// Real kernels with a piece cut out, doubled or replaced.
    #[test]
    fn damaged_kernels(which in 0usize..18, from in any::<prop::sample::Index>(), length in 0usize..40, how in 0u8..4) {
        let text = &samples()[which];
        let start = from.index(text.len());
        let end = (start + length).min(text.len());
        let damaged = match how {
            0 => format!("{}{}", &text[..start], &text[end..]),
            1 => text[..start].to_owned(),
            2 => format!("{}{}{}", &text[..end], &text[start..end], &text[end..]),
            _ => format!("{}{}{}", &text[..start], "%r1, 7 ] {".get(..length % 10).unwrap_or(""), &text[end..]),
        };
        let _ = load(&damaged);
    }
}
