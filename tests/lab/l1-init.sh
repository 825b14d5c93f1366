#!/bin/busybox sh
# L1, first step: the modules that find its disk. The rest is on there.
PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
mount -t ext4 -o noatime /dev/vda /mnt || poweroff -f
mount --move /dev /mnt/dev
exec switch_root /mnt /lab/l1.sh
