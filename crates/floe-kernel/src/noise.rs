//! Damage for tests of parsers: bytes that are nearly right.

/// Marsaglia's xorshift; the same bytes in every run.
pub struct Noise(u64);

/// How often a parser is tried.
const ROUNDS: usize = 4_000;

impl Noise {
    /// Tries `parse` with damaged forms of `sample`, and with the sample itself.
    pub fn damage(sample: &[u8], mut parse: impl FnMut(&[u8])) {
        parse(sample);
        let mut noise = Noise(88_172_645_463_325_252);
        for _ in 0..ROUNDS {
            let mut bytes = sample.to_vec();
            for _ in 0..1 + noise.below(4) {
                noise.change(&mut bytes);
            }
            parse(&bytes);
        }
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len().max(1));
        match self.below(6) {
            0 => bytes.truncate(at),
            1 => bytes.extend(std::iter::repeat_n(self.byte(), 1 + self.below(40))),
            2 if at < bytes.len() => {
                bytes.remove(at);
            }
            3 => bytes.insert(at, self.byte()),
            // The length or number that is there becomes another one.
            4 if at < bytes.len() => {
                bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b' ', b'-', b'9'][self.below(8)]
            }
            _ if at < bytes.len() => bytes[at] = self.byte(),
            _ => {}
        }
    }

    fn byte(&mut self) -> u8 {
        self.below(256) as u8
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

mod proc {
    use super::Noise;
    use crate::proc::*;

    /// Damaged forms of a file of our own, which `parse` may refuse but not fall over.
    fn damage_file<T>(path: &str, parse: fn(&[u8]) -> T) {
        // Not every kernel has all of them.
        let text = std::fs::read(path).unwrap_or_default();
        // Long files are of one kind of line.
        let some = &text[..text.len().min(2000)];
        Noise::damage(some, |bytes| drop(parse(bytes)));
    }

    #[test]
    fn parsers_of_proc_survive_any_text() {
        damage_file("/proc/self/maps", parse_maps);
        damage_file("/proc/self/smaps", parse_maps);
        damage_file("/proc/self/mountinfo", parse_mountinfo);
        damage_file("/proc/self/stat", parse_stat);
        damage_file("/proc/self/status", parse_status);
        damage_file("/proc/self/cgroup", parse_cgroup);
        damage_file("/proc/self/timers", parse_timers);
        damage_file("/proc/locks", parse_locks);
        damage_file("/proc/sysvipc/shm", parse_sysvipc_shm);
        damage_file("/proc/sysvipc/sem", parse_sysvipc_sem);
        damage_file("/proc/sysvipc/msg", parse_sysvipc_msg);
        damage_file("/proc/self/fdinfo/0", |bytes| parse_fdinfo(bytes.to_vec()));
    }

    #[test]
    fn parsers_of_proc_survive_lines_that_this_machine_has_not() {
        let locks = b"1: POSIX  ADVISORY  WRITE 12 fd:00:42 0 EOF\n1: -> FLOCK  MANDATORY READ -1 00:ff:1 0 9\n";
        Noise::damage(locks, |bytes| drop(parse_locks(bytes)));
        let timers = b"ID: 0\nsignal: 34/0000000000000001\nnotify: signal/tid.77\nClockID: 1\n";
        Noise::damage(timers, |bytes| drop(parse_timers(bytes)));
        let mount = b"36 35 98:0 /a\\040b /c\\134 rw,noatime shared:1 master:2 propagate_from:3 unbindable - ext3 /dev/x rw\n36 35 0:1 / / rw -  tmpfs  rw\n";
        Noise::damage(mount, |bytes| drop(parse_mountinfo(bytes)));
        let shm = b"head\n -2 32768 1600 56 5527 5534 3 101 104 102 105 1 2 3 4 5\n";
        Noise::damage(shm, |bytes| drop(parse_sysvipc_shm(bytes)));
        let fdinfo = b"pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t2\ninotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d\n";
        Noise::damage(fdinfo, |bytes| drop(parse_fdinfo(bytes.to_vec())));
    }
}

#[test]
fn netlink_messages_survive_any_bytes() {
    use crate::netlink::{attribute, attributes, message, messages, nested};
    let mut body = Vec::new();
    attribute(&mut body, 3, b"eth0\0");
    nested(&mut body, 18, |inner| attribute(inner, 1, b"veth\0"));
    let mut datagram = message(16, 2, &body);
    datagram.extend(message(3, 2, &0i32.to_ne_bytes()));
    Noise::damage(&datagram, |bytes| {
        // Every step goes on by at least a header, so that any input ends.
        for message in messages(bytes).flatten() {
            let nested = attributes(message.body).flat_map(|(_, value)| attributes(value));
            assert!(nested.count() <= bytes.len());
        }
    });
}
