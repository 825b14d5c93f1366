#!/bin/busybox sh
# L2: the guest. What it is to do comes as variables on the kernel's command line: LAB_DO (check,
# measure, shell), LAB_END (reboot, and power-off then; or power-off at once). It says as little as it can on the console,
# where each byte is an exit, and leaves its files on the disk.
echo "LAB init"
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done

end() {
    case $LAB_END in
    reboot) reboot -f ;;
    *) poweroff -f ;;
    esac
    sleep 60
    echo "LAB failed: it goes on after $LAB_END"
}

fail() {
    echo "LAB failed: $*"
    dmesg
    end
}

[ "$LAB_DO" = shell ] && { setsid cttyhack sh; end; }
mount -t ext4 /dev/vda /mnt || fail "no ext4 on /dev/vda"
echo "LAB ready"

# Each CPU reads through the queue that is its own.
on_each_cpu() {
    cpus=$(nproc)
    cpu=0
    while [ $cpu -lt $cpus ]; do
        taskset $(printf %x $((1 << cpu))) \
            dd if=/dev/vda of=/dev/null bs=4k count=8 skip=$((cpu * 8)) iflag=direct 2>/dev/null ||
            fail "reading on CPU $cpu"
        cpu=$((cpu + 1))
    done
}

# After the reboot it reads once more what it wrote before, and powers off.
again() {
    sum=$(md5sum </mnt/copy) || fail "reading"
    # heddle counts for each machine anew what its vCPUs did.
    on_each_cpu
    umount /mnt || fail "umount"
    echo "LAB again ${sum%% *}"
    LAB_END=poweroff
}

check() {
    [ -d /mnt/out ] && { again; return; }
    mkdir /mnt/out
    cp /mnt/source /mnt/copy && sync || fail "copying"
    echo 3 >/proc/sys/vm/drop_caches
    sum=$(md5sum </mnt/copy) || fail "reading"
    on_each_cpu
    grep . /sys/block/vda/mq/*/cpu_list >/mnt/out/mq
    cat /proc/interrupts >/mnt/out/interrupts
    cat /proc/iomem /proc/ioports >/mnt/out/resources
    dmesg -r >/mnt/out/dmesg
    umount /mnt || fail "umount"
    echo "LAB cpus $cpus"
    echo "LAB sum ${sum%% *}"
}

# Each step is told with a line before and after it, at which L1 reads its counters. The first reads
# bring what the program needs into memory; with one block they give the cost of the rest.
reads() {
    echo "LAB begin $1"
    dd if=/dev/vda of=/dev/null bs=4k count=$2 iflag=direct status=none || fail "reading"
    echo "LAB end $1"
}

measure() {
    sleep 2
    echo "LAB idle"
    sleep 2
    reads warm 10
    reads few 1
    reads many 2001
    umount /mnt
}

$LAB_DO
end
