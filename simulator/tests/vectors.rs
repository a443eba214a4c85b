//! Loads and stores of one, two and four elements of every type in every state space: bytes, sign, and padding of the
//! registers.

mod common;

use common::Random;
use cuda_sim::{Arch, Device, LaunchConfig, Options};

/// Name, bytes, whether loads fill wider registers by the sign.
const TYPES: [(&str, usize, bool); 14] = [
    ("b8", 1, false),
    ("u8", 1, false),
    ("s8", 1, true),
    ("b16", 2, false),
    ("u16", 2, false),
    ("s16", 2, true),
    ("b32", 4, false),
    ("u32", 4, false),
    ("s32", 4, true),
    ("f32", 4, false),
    ("b64", 8, false),
    ("u64", 8, false),
    ("s64", 8, true),
    ("f64", 8, false),
];

const THREADS: usize = 40;

/// Registers that a load or store of a type may use: its own width, and wider ones for integers and bits.
fn registers(name: &str, bytes: usize) -> Vec<(&'static str, usize)> {
    match name {
        "f32" => vec![("f32", 4)],
        "f64" => vec![("f64", 8)],
        _ => [("b16", 2), ("b32", 4), ("b64", 8)].into_iter().filter(|(_, n)| *n >= bytes).collect(),
    }
}

/// A state space as a kernel sees it: what is declared before and in the kernel, instructions that leave the address of a
/// thread's region in `%rd4`, and the state space of the access.
struct Place {
    space: &'static str,
    outside: String,
    inside: String,
    address: String,
    writable: bool,
}

/// Places for `size` bytes a thread. Constant and parameter memory hold `data`, the same for all threads.
fn places(size: usize, data: &[u8]) -> Vec<Place> {
    let place = |space, outside: String, inside: &str, address: String, writable| Place {
        space,
        outside,
        inside: inside.into(),
        address,
        writable,
    };
    let list: Vec<String> = data[..size].iter().map(u8::to_string).collect();
    let mine = format!("mul.wide.u32 %rd4, %r0, {size}; add.u64 %rd4, %rd4, %rd3;");
    let shared = format!(".shared .align 32 .b8 s[{}];", THREADS * size);
    let local = format!(".local .align 32 .b8 l[{size}];");
    vec![
        place(".global", String::new(), "", format!("mov.u64 %rd3, %rd2; {mine}"), true),
        place("", String::new(), "", format!("mov.u64 %rd3, %rd2; {mine}"), true),
        place(".shared", String::new(), &shared, format!("mov.u64 %rd3, s; {mine}"), true),
        place("", String::new(), &shared, format!("mov.u64 %rd3, s; cvta.shared.u64 %rd3, %rd3; {mine}"), true),
        place(".local", String::new(), &local, "mov.u64 %rd4, l;".into(), true),
        place("", String::new(), &local, "mov.u64 %rd4, l; cvta.local.u64 %rd4, %rd4;".into(), true),
        place(
            ".const",
            format!(".const .align 32 .b8 c[{size}] = {{{}}};\n", list.join(", ")),
            "",
            "mov.u64 %rd4, c;".into(),
            false,
        ),
        place(
            "",
            format!(".const .align 32 .b8 c[{size}] = {{{}}};\n", list.join(", ")),
            "",
            "mov.u64 %rd4, c; cvta.const.u64 %rd4, %rd4;".into(),
            false,
        ),
        place(".param", String::new(), "", "mov.u64 %rd4, p;".into(), false),
    ]
}

/// Runs `body` in the middle of a kernel with parameters in, out, scratch and `p`; gives back `out`.
fn run(place: &Place, registers: &str, body: &str, data: &[u8], size: usize, out: usize) -> Vec<u8> {
    let text = format!(
        ".version 8.5\n.target sm_90\n.address_size 64\n{}.visible .entry k(.param .u64 in, .param .u64 out, .param .u64 scratch, \
         .param .align 32 .b8 p[{size}]) {{ {} .reg .b32 %r<8>; .reg .b64 %rd<16>; .reg .b16 %h<40>; {registers}\n\
         ld.param.u64 %rd0, [in]; ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [scratch]; mov.u32 %r0, %tid.x;\n{}\n{body} ret; }}",
        place.outside, place.inside, place.address
    );
    let device = Device::new(Arch::SM_90, Options::default());
    let module = device.load_module(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let input = device.alloc(data.len() as u64).unwrap();
    device.write(input, data).unwrap();
    let scratch = device.alloc((THREADS * size) as u64).unwrap();
    let output = device.alloc((THREADS * out) as u64).unwrap();
    device.memset(output, &[0xcc], (THREADS * out) as u64).unwrap();
    let params = [&input.to_le_bytes()[..], &output.to_le_bytes(), &scratch.to_le_bytes(), &[0; 8], &data[..size]];
    let f = module.function("k").unwrap();
    assert_eq!(f.params()[3].offset, 32);
    let config = LaunchConfig::new([1; 3], [THREADS as u32, 1, 1]);
    device.launch(&f, &config, &params.concat()).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let mut result = vec![0; THREADS * out];
    device.read(output, &mut result).unwrap();
    result
}

/// Copies a thread's `size` bytes between memory and its place, a byte at a time.
fn bytewise(load: &str, store: &str, from: &str, to: &str, size: usize) -> String {
    (0..size).map(|i| format!("ld{load}.u8 %h0, [{from}+{i}]; st{store}.u8 [{to}+{i}], %h0;\n")).collect()
}

fn braces(names: &[String]) -> String {
    if names.len() == 1 { names[0].clone() } else { format!("{{{}}}", names.join(", ")) }
}

fn random_bytes(n: usize, seed: u64) -> Vec<u8> {
    let mut r = Random(seed);
    (0..n).map(|_| (r.next() >> 7) as u8).collect()
}

#[test]
fn loads_of_every_type_width_and_space() {
    for (name, bytes, signed) in TYPES {
        for n in [1, 2, 4] {
            let size = n * bytes;
            let data = random_bytes(THREADS * size, (bytes * n) as u64 + 40);
            for (register, wide) in registers(name, bytes) {
                for place in places(size, &data) {
                    let names: Vec<String> = (0..n).map(|i| format!("%v{i}")).collect();
                    let vector = if n == 1 { String::new() } else { format!(".v{n}") };
                    // Own bytes of the input into the place, the load, and whole registers to the output.
                    let fill = match place.writable {
                        true => {
                            let from = format!("mul.wide.u32 %rd5, %r0, {size}; add.u64 %rd5, %rd5, %rd0;\n");
                            from + &bytewise(".global", place.space, "%rd5", "%rd4", size)
                        }
                        false => String::new(),
                    };
                    let mut body = format!("{fill}ld{}{vector}.{name} {}, [%rd4];\n", place.space, braces(&names));
                    body += &format!("mul.wide.u32 %rd6, %r0, {}; add.u64 %rd6, %rd6, %rd1;\n", n * wide);
                    for (i, v) in names.iter().enumerate() {
                        body += &format!("st.global.{register} [%rd6+{}], {v};\n", i * wide);
                    }
                    let got = run(&place, &format!(".reg .{register} %v<4>;"), &body, &data, size, n * wide);
                    for (i, got) in got.chunks_exact(wide).enumerate() {
                        let at = if place.writable { i } else { i % n };
                        let element = &data[at * bytes..][..bytes];
                        let fill = if signed && element[bytes - 1] >> 7 == 1 { 0xff } else { 0 };
                        let want: Vec<u8> = element.iter().copied().chain([fill; 8]).take(wide).collect();
                        let (space, t) = (place.space, place.address.as_str());
                        assert_eq!(got, want, "ld{space}{vector}.{name} to {register}, element {i}, at {t}");
                    }
                }
            }
        }
    }
}

#[test]
fn stores_of_every_type_width_and_space() {
    for (name, bytes, _) in TYPES {
        for n in [1, 2, 4] {
            let size = n * bytes;
            for (register, wide) in registers(name, bytes) {
                // Registers with more bits than are stored.
                let data = random_bytes(THREADS * n * wide, (bytes * n) as u64 + 80);
                for place in places(size, &data).into_iter().filter(|p| p.writable) {
                    let names: Vec<String> = (0..n).map(|i| format!("%v{i}")).collect();
                    let vector = if n == 1 { String::new() } else { format!(".v{n}") };
                    let mut body = format!("mul.wide.u32 %rd5, %r0, {}; add.u64 %rd5, %rd5, %rd0;\n", n * wide);
                    for (i, v) in names.iter().enumerate() {
                        body += &format!("ld.global.{register} {v}, [%rd5+{}];\n", i * wide);
                    }
                    body += &format!("st{}{vector}.{name} [%rd4], {};\n", place.space, braces(&names));
                    body += &format!("mul.wide.u32 %rd6, %r0, {size}; add.u64 %rd6, %rd6, %rd1;\n");
                    body += &bytewise(place.space, ".global", "%rd4", "%rd6", size);
                    let got = run(&place, &format!(".reg .{register} %v<4>;"), &body, &data, size, size);
                    let want: Vec<u8> = data.chunks_exact(wide).flat_map(|r| &r[..bytes]).copied().collect();
                    assert_eq!(got, want, "st{}{vector}.{name} of {register}, at {}", place.space, place.address);
                }
            }
        }
    }
}

/// A vector must lie at a multiple of its whole size.
#[test]
fn vectors_off_their_alignment_are_misaligned() {
    for (name, bytes, _) in TYPES {
        for n in [1usize, 2, 4] {
            let size = n * bytes;
            for offset in (1..size).filter(|o| o.is_power_of_two()) {
                let vector = if n == 1 { String::new() } else { format!(".v{n}") };
                let (register, _) = registers(name, bytes)[0];
                let names: Vec<String> = (0..n).map(|i| format!("%v{i}")).collect();
                let text = format!(
                    ".version 8.5\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 in) {{ .reg .b64 %rd<2>; .reg .{register} %v<4>;\n\
                     ld.param.u64 %rd0, [in]; ld.global{vector}.{name} {}, [%rd0+{offset}]; ret; }}",
                    braces(&names)
                );
                let device = Device::new(Arch::SM_90, Options::default());
                let module = device.load_module(&text).unwrap();
                let input = device.alloc(128).unwrap();
                device.memset(input, &[0], 128).unwrap();
                let f = module.function("k").unwrap();
                let fault = device.launch(&f, &LaunchConfig::new([1; 3], [1; 3]), &input.to_le_bytes()).unwrap_err();
                assert_eq!(fault.cuda_error, 716, "ld{vector}.{name} at {offset}: {fault}");
            }
        }
    }
}
